"""Finding the layers of a model that can be quantised, and saying of the others why not."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qtrain.models.forms import LayerForm, describe_model
from qtrain.modes import evaluating
from qtrain.nn import QuantConv2d, QuantLayer, QuantLinear


@dataclass(frozen=True)
class Quantizable:
    """Layers of a model in the order in which they run, and reasons for those left out; keys are qualified names."""

    layers: dict[str, LayerForm]
    skipped: dict[str, str]


def find_layers(model: nn.Module, example: Tensor) -> Quantizable:
    """Every convolution and linear layer of ``model`` that conversion can replace.

    One forward of ``example`` (N, C, H, W), in eval mode and without gradient, gives the order, and unmasks layers
    whose owner uses their weight without calling them: replacing such a layer would quantise nothing, so they are
    skipped with that reason.
    """
    described = describe_model(model)
    forms = {name: form for name, form in described.items() if isinstance(form, LayerForm)}
    skipped = {name: reason for name, reason in described.items() if isinstance(reason, str)}
    order = _call_order(model, example, list(forms))
    for name in forms:
        if name not in order:
            skipped[name] = "never called: its owner uses the weight directly, or leaves the layer out in eval mode"
    return Quantizable({name: forms[name] for name in order}, skipped)


def quant_layers(model: nn.Module) -> dict[str, QuantLayer]:
    """The converted layers of ``model`` by qualified name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantConv2d | QuantLinear)}


def set_quantization(model: nn.Module, *, enabled: bool) -> None:
    """Switch all quantizers of ``model``; disabled, it computes in full precision, bit for bit as unconverted."""
    for layer in quant_layers(model).values():
        for quantizer in (layer.weight_quantizer, layer.input_quantizer):
            if quantizer is not None:
                quantizer.enabled = enabled


def _call_order(model: nn.Module, example: Tensor, names: list[str]) -> list[str]:
    order: dict[str, None] = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: order.setdefault(name))
        for name in names
    ]
    try:
        with evaluating(model), torch.no_grad():
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    return list(order)
