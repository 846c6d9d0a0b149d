"""Batch norm statistics computed again for the final weights.

Running statistics are an average over the last steps, during which weights and scales still changed. At two bits this
alone costs points of accuracy. So they are averaged over new batches with everything frozen (Wu and Johnson 2021,
"Rethinking 'Batch' in BatchNorm", arXiv 2105.07576, §3.1: "precise BN").
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qtrain.nn.folded import holding_factors
from qtrain.utils.eval_mode import evaluating


@torch.no_grad()
def reestimate_batchnorm(model: nn.Module, batches: Iterable[Tensor]) -> int:
    """Set each running mean and variance to the mean of the statistics of ``batches``, each (N, C, H, W).

    Only batch norm layers are in training mode meanwhile: they normalize by the batch, as in training, while dropout is
    off and quantizers do not learn. Modes and momenta are restored. A layer that no batch reached keeps its statistics,
    and all do where a forward fails. Returns the number of batches. Without batches, or without a batch norm that keeps
    statistics, it returns 0 and changes nothing.
    """
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    iterator = iter(batches)
    first = next(iterator, None)
    if not layers or first is None:
        return 0
    momenta = {layer: layer.momentum for layer in layers}
    counts = {layer: layer.num_batches_tracked.clone() for layer in layers if layer.num_batches_tracked is not None}
    before = {
        layer: [(kept, kept.clone()) for kept in (layer.running_mean, layer.running_var) if kept is not None]
        for layer in layers
    }
    seen, whole = 0, False
    try:
        # Eagerly, since a graph compiled for training contains the old momentum.
        with evaluating(model), holding_factors(model), torch.compiler.set_stance("force_eager"):
            for layer in layers:
                layer.reset_running_stats()
                layer.momentum = None  # means for torch: the mean of all batches since the reset
                layer.train()
            for image in _chain(first, iterator):
                model(image)
                seen += 1
            whole = True
    finally:
        for layer in layers:
            layer.momentum = momenta[layer]
            if not whole or _as_reset(layer):
                for kept, value in before[layer]:
                    kept.copy_(value)
        for layer, count in counts.items():
            layer.num_batches_tracked.copy_(count)  # type: ignore[union-attr]
    return seen


def _as_reset(layer: _BatchNorm) -> bool:
    """Whether the statistics of ``layer`` are those of a new one: no batch came to it."""
    mean, var = layer.running_mean, layer.running_var
    return mean is None or var is None or bool((mean == 0).all() and (var == 1).all())


def _chain(first: Tensor, rest: Iterable[Tensor]) -> Iterable[Tensor]:
    yield first
    yield from rest
