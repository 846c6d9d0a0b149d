"""Putting quantised layers in place of a model's own, by an allocation of bits."""

from __future__ import annotations

import difflib
import logging
from typing import Protocol

from torch import nn

from qtrain.convert.layers import Quantizable
from qtrain.models.forms import LayerForm
from qtrain.nn import QuantConv2d, QuantLayer, QuantLinear
from qtrain.quantizers.base import Quantizer
from qtrain.spec import FULL_PRECISION, Allocation, QuantSpec

log = logging.getLogger(__name__)


class MakeQuantizer(Protocol):
    """What a config's quantizer is before it knows its tensor: a constructor that lacks only ``spec``."""

    def __call__(self, *, spec: QuantSpec) -> Quantizer: ...


def swap_layers(
    model: nn.Module,
    found: Quantizable,
    allocation: Allocation,
    *,
    weight: MakeQuantizer,
    input: MakeQuantizer,
) -> None:
    """Replace, in place, every layer that ``allocation`` names by its quantised form; parameters are shared.

    Layers that are quantizable but unnamed, or named with ``FULL_PRECISION`` for both, stay as they are. What was
    skipped is logged, once, with the reason. Raises ``ValueError`` for a name that is not a quantizable layer.
    """
    for name in allocation:
        if name not in found.layers:
            reason = found.skipped.get(name) or f"no such layer; close: {difflib.get_close_matches(name, found.layers)}"
            raise ValueError(f"allocation: layer {name!r} cannot be quantised: {reason}")
    for name, reason in found.skipped.items():
        log.warning("left in full precision: %s: %s", name, reason)
    for name, form in found.layers.items():
        bits = allocation.get(name)
        if bits is None or (bits.weight == FULL_PRECISION and bits.input == FULL_PRECISION):
            log.info("left in full precision: %s: the allocation gives it no bits", name)
            continue
        source = model.get_submodule(name)
        layer = _quantised(source, form)
        if bits.weight != FULL_PRECISION:
            layer.weight_quantizer = weight(
                spec=QuantSpec(bits=bits.weight, shape=tuple(layer.weight.shape), signed=True)
            )
        if bits.input != FULL_PRECISION:
            layer.input_quantizer = input(spec=QuantSpec(bits=bits.input))
        layer.to(layer.weight.device)
        _replace(model, source, layer)


def _quantised(source: nn.Module, form: LayerForm) -> QuantLayer:
    if form.kind == "conv2d":
        assert isinstance(source, nn.Conv2d)
        return QuantConv2d(source=source, pad=form.pad, weight_transform=form.weight_transform)
    assert isinstance(source, nn.Linear)
    return QuantLinear(source=source)


def _replace(model: nn.Module, source: nn.Module, layer: nn.Module) -> None:
    # Everywhere, since a module that is shared has several names and only the first is among the found.
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is source:
                setattr(parent, name, layer)
