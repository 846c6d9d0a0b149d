"""Replacing the layers of a model by quantized ones, each by its plan."""

import logging
from collections.abc import Callable, Hashable, Mapping

from torch import nn

from qtrain.convert.layers import Quantizable
from qtrain.convert.plan import LayerPlan
from qtrain.convert.replace import quantized_form, replace_module
from qtrain.nn import Operand, QuantConvTranspose
from qtrain.quantizers.base import Quantizer
from qtrain.spec import FULL_PRECISION, QuantSpec
from qtrain.utils.sharing import place_of

log = logging.getLogger(__name__)

MakeGradientQuantizer = Callable[[], nn.Module]


def swap_layers(
    model: nn.Module,
    found: Quantizable,
    plans: Mapping[str, LayerPlan],
    *,
    gradient: MakeGradientQuantizer | None = None,
) -> None:
    """Replace every layer that has bits in ``plans`` by its quantized form, in place; parameters are shared.

    Layers that stay in full precision are logged once, with the reason. ``gradient`` makes the quantizer of the
    gradient that reaches a layer with a quantized weight in the backward. Raises ``ValueError``, which begins with the
    layer's name, where a quantizer refuses a layer.
    """
    of_tied: dict[Hashable, Quantizer] = {}
    for name, reason in found.skipped.items():
        log.warning("left in full precision: %s: %s", name, reason)
    for name, form in found.layers.items():
        plan = plans[name]
        bits, source = plan.bits, model.get_submodule(name)
        if bits.weight == FULL_PRECISION and bits.input == FULL_PRECISION:
            if not isinstance(source, Operand):  # a target that quantizes a shortcut alone leaves the other operand
                log.info("left in full precision: %s: the allocation gives it no bits", name)
            continue
        layer = quantized_form(source, form)
        try:
            if bits.weight != FULL_PRECISION and not isinstance(layer, Operand):
                shape = tuple(layer.effective_weight().shape)
                # Layers that share a weight share its codes, so they need one quantizer. A transposed convolution has
                # other output channels than a convolution with the same weight, and so other codes.
                # A gain that standardizes the weight makes other values of it.
                own = layer if getattr(layer, "weight_transform", None) is not None else None
                key = (place_of(layer.weight), id(plan.weight), bits.weight, isinstance(layer, QuantConvTranspose), own)
                if key not in of_tied:
                    of_tied[key] = plan.weight(spec=QuantSpec(bits=bits.weight, shape=shape, signed=True))
                    of_tied[key].made_by = plan.weight
                layer.weight_quantizer = of_tied[key]
            if bits.input != FULL_PRECISION and form.kind != "embedding":
                axis = 1 if form.kind.startswith("conv") else -1
                layer.input_quantizer = plan.input(spec=QuantSpec(bits=bits.input, channel_axis=axis))
                layer.input_quantizer.made_by = plan.input
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from error
        if gradient is not None and layer.weight_quantizer is not None:
            layer.gradient_quantizer = gradient()
        if isinstance(source, Operand):
            continue
        layer.to(source.weight.device)  # type: ignore[arg-type]
        replace_module(model, source, layer)
