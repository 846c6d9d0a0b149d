"""Filling the quantizers' state from the weights and from a few batches of images."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor, nn

from qtrain.convert.layers import quant_layers, set_quantization
from qtrain.modes import evaluating
from qtrain.observers.base import Observer
from qtrain.spec import Granularity


class MakeObserver(Protocol):
    """What a config's observer is before it knows its quantizer: a constructor that lacks only ``granularity``."""

    def __call__(self, *, granularity: Granularity) -> Observer: ...


@torch.no_grad()
def calibrate(model: nn.Module, images: Iterable[Tensor], *, weight: MakeObserver, input: MakeObserver) -> None:
    """Initialise every quantizer of ``model`` in place.

    Weights are observed as they are; inputs over a full-precision forward of ``images``, an iterable of
    (N, C, H, W), in eval mode, so that one layer's rounding does not colour what the next one observes. The modes of
    all modules are restored. Raises ``ValueError`` where a layer with an input quantizer saw no image.
    """
    layers = quant_layers(model)
    for layer in layers.values():
        if layer.weight_quantizer is not None:
            observer = weight(granularity=layer.weight_quantizer.granularity)
            tensor = layer.effective_weight()
            observer.update(tensor)
            observed = observer.observed(int(layer.weight_quantizer.bits))
            layer.weight_quantizer.calibrate_(observed._replace(tensor=tensor))

    observers: dict[str, Observer] = {}
    handles = []
    for name, layer in layers.items():
        if layer.input_quantizer is not None:
            observers[name] = input(granularity=layer.input_quantizer.granularity)
            observe = observers[name].update
            handles.append(layer.register_forward_pre_hook(lambda _, args, observe=observe: observe(args[0])))
    set_quantization(model, enabled=False)
    try:
        with evaluating(model):
            for batch in images:
                model(batch)
    finally:
        for handle in handles:
            handle.remove()
        set_quantization(model, enabled=True)

    for name, observer in observers.items():
        quantizer = layers[name].input_quantizer
        assert quantizer is not None
        if observer.shape is None:
            raise ValueError(f"calibrate: layer {name!r} saw no image; give at least one calibration batch")
        quantizer.calibrate_(observer.observed(int(quantizer.bits)))
