"""Calibration without images: the range of each layer's input from the statistics that batch norm has kept.

Data-free quantization (Nagel et al. 2019, arXiv 1906.04721, §5) takes ``beta -+ n gamma`` of the channels, as a ReLU
clips them, with n = 6. Here the observer of the layer's plan gets such values. So ``min_max`` gives the paper's range,
and ``squared_error`` the range with the least error for values of that distribution.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qtrain.convert.calibrate import calibrate_weights, observe_weights
from qtrain.convert.fold import OutputStatistics
from qtrain.convert.layers import quant_layers
from qtrain.convert.plan import LayerPlan, observer_for
from qtrain.observers.base import Observer
from qtrain.ptq.bn_propagation import BOUNDS, DEVIATIONS, ROWS, follow, standard_normal
from qtrain.quantizers.base import Quantizer


@torch.no_grad()
def calibrate_from_statistics(
    model: nn.Module,
    plans: Mapping[str, LayerPlan],
    statistics: Mapping[str, OutputStatistics],
    *,
    low: Tensor,
    high: Tensor,
    deviations: float = DEVIATIONS,
) -> None:
    """Initialize every quantizer of ``model`` in place: from the weights, and for inputs only from ``statistics``.

    ``statistics`` are those of the outputs of layers, as :func:`qtrain.convert.fold.fold_batchnorm_` returns them;
    batch norms that are not folded have their own. ``low`` and ``high``, (C,), are the values of black and of white
    pixels: the input of the first layer lies between them, with mean 0 and standard deviation 1. ``deviations`` is n.
    Raises ``ValueError`` where there are no statistics, where they cannot be followed through the model, and where they
    do not reach a layer.
    """
    if deviations <= 0:
        raise ValueError(f"calibrate_from_statistics: deviations must be above 0, got {deviations}; 6 is usual")
    calibrate_weights(model, observe_weights(model, plans))
    device = next(model.parameters()).device
    inputs = follow(model, statistics, image_values(low, high).to(device), deviations=deviations)
    observers: dict[Quantizer, Observer] = {}  # layers that share a quantizer are observed as one
    for name, layer in quant_layers(model).items():
        quantizer = layer.input_quantizer
        if quantizer is None:
            continue
        if name not in inputs:
            raise ValueError(
                f"quantize.calibration: layer {name!r} is inside a module that cannot be traced, so that statistics "
                "say nothing of its input; take quantize.calibration=images"
            )
        made = observer_for(quantizer, plans[name].input_observer)
        observers.setdefault(quantizer, made).update(inputs[name])
    for quantizer, observer in observers.items():
        quantizer.calibrate_(observer.observed(int(quantizer.bits)))


def image_values(low: Tensor, high: Tensor) -> Tensor:
    """Values of normalized pixels, (BOUNDS + ROWS, C, 1, 1): standard normal, between ``low`` and ``high`` (C,)."""
    values = standard_normal().to(low).unsqueeze(1).expand(ROWS, len(low))
    rows = torch.cat((torch.stack((low, high)), values.clamp(low, high)))
    assert len(rows) == BOUNDS + ROWS
    return rows[..., None, None]
