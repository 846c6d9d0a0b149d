"""A student as a network whose layers emit the operators of ONNX that compute the same with whole numbers.

A layer becomes: its input, quantized and dequantized; its weight, dequantized from codes; its bias; and the operation
itself. Runtimes know this pattern and run it with integers. A batch norm behind a layer changes the scale of each
output channel and the bias, but no code.
"""

import logging
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qtrain.convert.fold import foldable
from qtrain.convert.graph import Skipped
from qtrain.convert.replace import replace_module
from qtrain.deployment.onnx.forms import Codes, NoFormError, gate_steps, input_codes
from qtrain.deployment.onnx.symbolic import CodedGate, CodedWeight, Constant, LoweredLayer, QuantizedInput
from qtrain.deployment.onnx.weights import BiasCodes, WeightCodes, finer, scaled, weight_codes, with_room_for
from qtrain.models.norms import NormForm, describe_norm
from qtrain.nn import Operand, QuantConv, QuantConvTranspose, QuantLayer, QuantLinear
from qtrain.nn.base import quantized_weight
from qtrain.nn.conv_transpose import outputs_first
from qtrain.nn.folded import FoldedWeight
from qtrain.nn.operations import HARD_GATES, Applied, Operation
from qtrain.quantizers.base import Quantizer
from qtrain.utils.compat import has_hooks, share_hooks_
from qtrain.utils.copies import copied

log = logging.getLogger(__name__)


@dataclass
class Lowering:
    """What became of a student: ``model`` emits ONNX, ``notes`` say by layer what stays in floating point and why.

    ``inputs`` are the quantized inputs, and ``biases`` those that can be stored as codes, by the layer's name. What a
    layer reads after another one's quantizer is there as ``NAME.tensor`` too. ``gates`` are hard sigmoids, and whether
    the codes that they read are clipped behind their quantizer.
    """

    model: nn.Module
    inputs: dict[str, Codes] = field(default_factory=dict)
    biases: dict[str, BiasCodes] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    gates: dict[str, bool] = field(default_factory=dict)


@torch.no_grad()
def lower(student: nn.Module) -> Lowering:
    """``student`` as a network of symbolic operators, with biases in floating point; it is left as it was.

    Raises ``ValueError`` with the layer and the reason where an input has no form in ONNX.
    """
    model = copied(student).eval().requires_grad_(False).cpu().float()
    lowering, norms = Lowering(model), dict(norms_of(model))
    gates = {n: m for n, m in model.named_modules() if isinstance(m, Applied) and m.function_name in HARD_GATES}
    for name, layer in list(model.named_modules()):
        if isinstance(layer, QuantLayer):
            norm = norms.get(name)
            form = None if norm is None else norm[1]
            replace_module(model, layer, _with_hooks_of(layer, _lowered(name, layer, form, lowering)))
            if norm is not None:
                old = model.get_submodule(norm[0])
                replace_module(model, old, rest_in_place(old, norm[1]))
    for name, module in gates.items():
        codes = lowering.inputs.get(f"{name}.input")
        if codes is not None and (steps := gate_steps(codes)) is not None:
            swish = module.function_name == "hardswish"
            gate = CodedGate(module.input, codes, steps=steps, swish=swish)
            replace_module(model, module, _with_hooks_of(module, gate))
            if not swish:
                lowering.gates[name] = gate.clipped
    return lowering


def _with_hooks_of(module: nn.Module, made: nn.Module) -> nn.Module:
    """``made``, which takes the place of ``module``, with the hooks that somebody has given that."""
    if has_hooks(module):
        share_hooks_(module, made)
    return made


def rest_in_place(norm: nn.Module, form: NormForm) -> nn.Module:
    """What is left of ``norm``, to stand in its place, with quantizers of its activation under the names they had."""
    if not any(isinstance(module, Operation) for module in form.rest.modules()):
        return form.rest
    return nn.Sequential(OrderedDict((name, part) for name, part in norm.named_children() if name in ("drop", "act")))


def norms_of(model: nn.Module, *, quiet: bool = False) -> Iterator[tuple[str, tuple[str, NormForm]]]:
    """(layer, (norm's name, norm's form)) for each batch norm that only a quantized layer feeds.

    Why there are others is logged unless ``quiet``.
    """
    if all(describe_norm(module) is None for module in model.modules()):
        return
    skipped = Skipped("batch norm stays a layer of its own in the file")
    try:
        for layer_name, layer, norm_name, form in foldable(model, "export", skipped):
            if isinstance(layer, QuantConv | QuantConvTranspose | QuantLinear):
                yield layer_name, (norm_name, form)
    except ValueError as error:  # a network that cannot be traced
        if not quiet:
            log.warning("batch norms stay layers of their own in the file: %s", error)
    if not quiet:
        skipped.log()


def _lowered(name: str, layer: QuantLayer, norm: NormForm | None, lowering: Lowering) -> nn.Module:
    codes, before = _input(name, layer.input_quantizer), _input(name, layer.tensor_quantizer)
    tensor = None if before is None else QuantizedInput(before)
    inputs = None if codes is None else QuantizedInput(codes)
    if codes is not None:
        lowering.inputs[name] = codes
    if before is not None:
        lowering.inputs[f"{name}.tensor"] = before
    # Sums of such codes have one scale for each output.
    step = None if codes is None or codes.offset is not None or codes.axis is not None else codes.step
    if codes is not None and step is None:
        lowering.notes[name] = "its input has an offset or a scale for each channel; it runs in floating point"
    if isinstance(layer, Operand):
        return nn.Identity() if inputs is None else inputs
    bias = bias_with(layer, norm)
    weight = weight_of(layer, norm)
    if isinstance(weight, str):
        lowering.notes[name] = weight
        return LoweredLayer(layer, inputs, Constant(_layout(layer, _values(layer, norm))), bias, tensor)
    weight = finer(weight)
    if bias is not None and step is not None:
        weight = with_room_for(weight, bias.abs() / step)
        lowering.biases[name] = BiasCodes.of(bias, step * weight.scale)
    axis = 1 if isinstance(layer, QuantConvTranspose) else 0
    return LoweredLayer(layer, inputs, CodedWeight(_layout(layer, weight.codes), weight, axis=axis), bias, tensor)


def _input(name: str, quantizer: Quantizer | None) -> Codes | None:
    if quantizer is None or not quantizer.enabled:
        return None
    try:
        return input_codes(quantizer)
    except NoFormError as error:
        raise ValueError(
            f"{name}: its input has no form in ONNX: {error}; quantize inputs by a uniform quantizer (lsq, affine, "
            "pact), or keep the packed student.safetensors"
        ) from error


def bias_with(layer: Any, norm: NormForm | None) -> Tensor | None:
    """The bias (O,) with ``norm`` merged in."""
    bias: Tensor | None = getattr(layer, "bias", None)
    if norm is None:
        return bias
    return norm.shift if bias is None else bias * norm.scale + norm.shift


def weight_of(layer: Any, norm: NormForm | None) -> WeightCodes | str:
    """The weight's codes with ``norm`` merged in, or why it has none."""
    if layer.weight_quantizer is None or not layer.weight_quantizer.enabled:
        return "its weight is in full precision"
    weight = weight_codes(layer.weight_quantizer.quantize(layer.effective_weight()))
    if weight is None:
        return "its weight has no evenly spaced codes for each output; the file has its values instead"
    factor = torch.ones_like(weight.scale) if norm is None else norm.scale
    if isinstance(transform := getattr(layer, "weight_transform", None), FoldedWeight):
        factor = factor / transform.factor(weight.scale)  # its codes are those of the merged weight
    weight = scaled(weight, factor)
    if isinstance(layer, QuantConvTranspose) and layer.groups > 1 and not weight.uniform:
        return "ONNX has no scales for the outputs of a transposed convolution in groups; the file has its values"
    return weight


def _values(layer: Any, norm: NormForm | None) -> Tensor:
    """The weight (O, I, ...) as it is multiplied, with ``norm`` merged in."""
    values = quantized_weight(layer)
    return values if norm is None else values * norm.scale.reshape(-1, *(1 for _ in values.shape[1:]))


def _layout(layer: nn.Module, weight: Tensor) -> Tensor:
    """A weight (O, I, ...) in the layout of the layer's operation."""
    return outputs_first(weight, layer.groups) if isinstance(layer, QuantConvTranspose) else weight
