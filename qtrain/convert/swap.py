"""Replacing the layers of a model by quantized ones, each by its plan."""

import logging
from collections.abc import Callable, Hashable, Mapping

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from qtrain.convert.layers import Quantizable
from qtrain.convert.plan import LayerPlan
from qtrain.models.layer_kinds import LayerSpec
from qtrain.nn import Operand, QuantConv, QuantConvTranspose, QuantEmbedding, QuantLayer, QuantLinear
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
        bits = plan.bits
        if bits.weight == FULL_PRECISION and bits.input == FULL_PRECISION:
            log.info("left in full precision: %s: the allocation gives it no bits", name)
            continue
        source = model.get_submodule(name)
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


def quantized_form(source: nn.Module, form: LayerSpec) -> QuantLayer:
    """The quantized layer that takes the place of ``source``, without quantizers so far."""
    match form.kind:
        case "conv1d" | "conv2d" | "conv3d":
            assert isinstance(source, _ConvNd)
            made: QuantLayer = QuantConv(source=source, pad=form.pad, weight_transform=form.weight_transform)
        case "conv_transpose":
            assert isinstance(source, _ConvTransposeNd)
            made = QuantConvTranspose(source=source)
        case "embedding":
            assert isinstance(source, nn.Embedding)
            made = QuantEmbedding(source=source)
        case "operand":
            assert isinstance(source, Operand)
            made = source
        case _:
            assert isinstance(source, nn.Linear)
            made = QuantLinear(source=source)
    return made


def replace_module(model: nn.Module, source: nn.Module, layer: nn.Module) -> None:
    """Replace ``source`` by ``layer`` everywhere in ``model``: a module that is shared has several names."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is source:
                setattr(parent, name, layer)
