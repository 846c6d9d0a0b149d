"""What the student itself computes: the codes of each layer's input, and how near each was to the next code."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from qtrain.deployment.onnx.forms import Codes
from qtrain.deployment.onnx.write import call_of
from qtrain.deployment.parity.compare import Rounded, gap
from qtrain.nn import QuantLayer
from qtrain.quantizers.base import Quantizer
from qtrain.storage.affine import AffineTensor
from qtrain.storage.planes import BitPlanes
from qtrain.utils.calls import see_input
from qtrain.utils.eval_mode import evaluating


@dataclass
class Simulated:
    """The output, and the codes of the layers' inputs as the file stores them, by the call of the layer."""

    logits: Tensor
    inputs: dict[str, Rounded] = field(default_factory=dict)


@torch.no_grad()
def simulate(student: nn.Module, images: Tensor, inputs: Mapping[str, Codes]) -> Simulated:
    """Run ``student`` on ``images`` (N, C, H, W); ``inputs`` are the codes of its layers' inputs in the file."""
    seen = Simulated(torch.empty(0))

    def watch(name: str, quantizer: Quantizer, x: Tensor) -> None:
        form, stored = inputs[name], quantizer.quantize(x)
        assert isinstance(stored, AffineTensor | BitPlanes)
        codes = stored.codes.reshape(x.shape).to(torch.int64) + (form.low - stored.low)
        seen.inputs[call_of(name, seen.inputs)] = Rounded(codes, gap(form.steps(x)))

    def watch_layer(name: str, layer: QuantLayer, x: Tensor) -> None:
        if layer.tensor_quantizer is not None:
            watch(f"{name}.tensor", layer.tensor_quantizer, x)
            x = layer.tensor_quantizer(x)
        assert layer.input_quantizer is not None
        watch(name, layer.input_quantizer, x)

    hooks = [
        see_input(layer, partial(watch_layer, name, layer))
        for name, layer in student.named_modules()
        if isinstance(layer, QuantLayer) and layer.input_quantizer is not None and name in inputs
    ]
    try:
        with evaluating(student):
            seen.logits = student(images)
    finally:
        for hook in hooks:
            hook.remove()
    return seen
