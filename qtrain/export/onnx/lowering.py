"""A student as a network whose layers emit the operators of ONNX that compute the same with whole numbers.

A layer becomes: its input, quantized and dequantized; its weight, dequantized from codes; its bias; and the operation
itself. Runtimes know this pattern and run it with integers. A batch norm behind a layer changes the scale of each
output channel and the bias, but no code.
"""

import copy
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtrain.convert.fold import foldable
from qtrain.convert.graph import Skipped
from qtrain.convert.replace import replace_module
from qtrain.export.onnx.forms import Codes, NoFormError, WeightCodes, input_codes, weight_codes
from qtrain.models.layer_kinds import SamePad
from qtrain.models.norms import NormForm, describe_norm
from qtrain.nn import Operand, QuantConv, QuantConvTranspose, QuantLayer, QuantLinear
from qtrain.nn.base import quantized_weight
from qtrain.nn.conv_transpose import outputs_first
from qtrain.nn.folded import FoldedWeight
from qtrain.quantizers.base import Quantizer

log = logging.getLogger(__name__)

OPSET = 21
"""The first with 4-bit and 16-bit codes."""

_ROOM = 2**30
"""Largest code of a bias, half of what 32 bits hold, so that products can be added to it."""

_LARGEST = 64
"""Largest code of a weight of few bits: two products of such codes with 8 bits fit the 16 bits in which x86 processors
without VNNI add them."""


@dataclass
class Lowering:
    """What became of a student: ``model`` emits ONNX, ``notes`` say by layer what stays in floating point and why.

    ``inputs`` and ``weights`` are the quantized inputs and the weights that are stored as codes, by the layer's name;
    ``biases`` those that can be stored so.
    """

    model: nn.Module
    inputs: dict[str, Codes] = field(default_factory=dict)
    weights: dict[str, WeightCodes] = field(default_factory=dict)
    biases: dict[str, "BiasCodes"] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


@torch.no_grad()
def lower(student: nn.Module) -> Lowering:
    """``student`` as a network of symbolic operators, with biases in floating point; it is left as it was.

    Raises ``ValueError`` with the layer and the reason where an input has no form in ONNX.
    """
    model = copy.deepcopy(student).eval().requires_grad_(False).cpu().float()
    lowering, norms = Lowering(model), dict(_norms(model))
    for name, layer in list(model.named_modules()):
        if isinstance(layer, QuantLayer):
            norm = norms.get(name)
            form = None if norm is None else norm[1]
            replace_module(model, layer, _lowered(name, layer, form, lowering))
            if norm is not None:
                replace_module(model, model.get_submodule(norm[0]), norm[1].rest)
    return lowering


def _norms(model: nn.Module) -> Iterator[tuple[str, tuple[str, NormForm]]]:
    """(layer, (norm's name, norm's form)) for each batch norm that only a quantized layer feeds."""
    if all(describe_norm(module) is None for module in model.modules()):
        return
    skipped = Skipped("batch norm stays a layer of its own in the file")
    try:
        for layer_name, layer, norm_name, form in foldable(model, "export", skipped):
            if isinstance(layer, QuantConv | QuantConvTranspose | QuantLinear):
                yield layer_name, (norm_name, form)
    except ValueError as error:  # a network that cannot be traced
        log.warning("batch norms stay layers of their own in the file: %s", error)
    skipped.log()


def _lowered(name: str, layer: QuantLayer, norm: NormForm | None, lowering: Lowering) -> nn.Module:
    codes = _input(name, layer.input_quantizer)
    inputs = None if codes is None else QuantizedInput(codes)
    if codes is not None:
        lowering.inputs[name] = codes
        if codes.offset is not None or codes.axis is not None:
            lowering.notes[name] = "its input has an offset or a scale for each channel; it runs in floating point"
    if isinstance(layer, Operand):
        return nn.Identity() if inputs is None else inputs
    weight, bias = _weight_and_bias(name, layer, norm, lowering)
    if weight is None:
        values = quantized_weight(layer)
        if norm is not None:
            values = values * norm.scale.reshape(-1, *(1 for _ in values.shape[1:]))
        held: nn.Module = Constant(_layout(layer, values))
    else:
        held = CodedWeight(_layout(layer, weight.codes), weight, axis=_output_axis(layer))
    whole = weight is not None and codes is not None and codes.offset is None and codes.axis is None
    if bias is not None and whole:
        assert weight is not None and codes is not None
        lowering.biases[name] = BiasCodes.of(bias, codes.step * weight.scale)
    return LoweredLayer(layer, inputs, held, None if bias is None else Constant(bias))


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


def _weight_and_bias(
    name: str, layer: Any, norm: NormForm | None, lowering: Lowering
) -> tuple[WeightCodes | None, Tensor | None]:
    """The layer's weight as codes, ``None`` where it has none, and its bias (O,), both with ``norm`` merged in."""
    bias = getattr(layer, "bias", None)
    if norm is not None:
        bias = norm.shift if bias is None else bias * norm.scale + norm.shift
    if layer.weight_quantizer is None or not layer.weight_quantizer.enabled:
        lowering.notes[name] = "its weight is in full precision"
        return None, bias
    weight = weight_codes(layer.weight_quantizer.quantize(layer.effective_weight()))
    if weight is not None and isinstance(layer, QuantConvTranspose) and layer.groups > 1:
        weight = None if bool((weight.scale != weight.scale[0]).any()) else weight
    if weight is None:
        lowering.notes[name] = "its weight has no evenly spaced codes for each output; the file has its values instead"
        return None, bias
    factor = None if norm is None else norm.scale
    transform = getattr(layer, "weight_transform", None)
    if isinstance(transform, FoldedWeight):  # its codes are those of the merged weight
        factor = (1 if factor is None else factor) / transform.factor(weight.scale)
    if factor is not None:
        weight = _scaled(weight, factor.float())
    weight = _finer(weight)
    if (codes := lowering.inputs.get(name)) is not None and bias is not None and codes.scale.ndim == 0:
        weight = _with_room_for(weight, bias.abs() / codes.step)
    lowering.weights[name] = weight
    return weight, bias


def _scaled(weight: WeightCodes, factor: Tensor) -> WeightCodes:
    """``weight`` with each output channel multiplied by ``factor`` (O,): in the scale, and its sign in the codes."""
    sign = torch.where(factor < 0, -1, 1)
    codes = weight.codes * sign.reshape(-1, *(1 for _ in weight.codes.shape[1:]))
    return WeightCodes(codes, weight.scale * factor.abs(), weight.zero_point * sign)


def _finer(weight: WeightCodes) -> WeightCodes:
    """``weight`` in codes that are larger by a power of two, as far as :data:`_LARGEST` goes.

    The values stay what they are. The bias is rounded to multiples of the product of the two scales, which for few bits
    is coarse beside the steps of the next layer's input; in 8 bits, where the file stores the codes, there is room.
    """
    reach = int(torch.maximum(weight.codes.abs().max(), weight.zero_point.abs().max()))
    factor = 1
    while 2 * factor * reach <= _LARGEST:
        factor *= 2
    return WeightCodes(weight.codes * factor, weight.scale / factor, weight.zero_point * factor)


def _with_room_for(weight: WeightCodes, bias: Tensor) -> WeightCodes:
    """``weight`` whose scales are at least so large that ``bias`` (O,), in units of the input's scale, fits 32 bits.

    Only channels that batch norm has switched off have smaller ones; what their weights add is lost in the bias.
    """
    least = (bias / _ROOM).clamp(min=torch.finfo(torch.float32).tiny)
    scale = torch.maximum(weight.scale, least)
    ratio = (weight.scale / scale).reshape(-1, *(1 for _ in weight.codes.shape[1:]))
    zero = weight.zero_point.reshape(ratio.shape)
    codes = ((weight.codes - zero) * ratio).round().to(torch.int64) + zero
    return WeightCodes(torch.where(ratio < 1, codes, weight.codes), scale, weight.zero_point)


def _layout(layer: nn.Module, weight: Tensor) -> Tensor:
    """A weight (O, I, ...) in the layout of the layer's operation."""
    return outputs_first(weight, layer.groups) if isinstance(layer, QuantConvTranspose) else weight


def _output_axis(layer: nn.Module) -> int:
    return 1 if isinstance(layer, QuantConvTranspose) else 0


class Constant(nn.Module):
    """A tensor of the file."""

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value.detach().float().contiguous())

    def forward(self) -> Tensor:
        return self.value


class QuantizedInput(nn.Module):
    """QuantizeLinear, a clip and a shift of the codes where the type holds more of them, and DequantizeLinear."""

    scale: Tensor
    zero_point: Tensor
    low: Tensor
    high: Tensor
    shift: Tensor
    step: Tensor
    shifted_zero_point: Tensor
    offset: Tensor | None

    def __init__(self, codes: Codes) -> None:
        super().__init__()
        self.axis, self.clipped, self.dtype = codes.axis, codes.clipped, codes.dtype
        self.register_buffer("scale", codes.scale.clone())
        self.register_buffer("zero_point", codes.zero_point.clone())
        self.register_buffer("low", torch.tensor(codes.low).to(codes.dtype))
        self.register_buffer("high", torch.tensor(codes.high).to(codes.dtype))
        self.shifted = codes.shift > 0
        self.register_buffer("shift", torch.tensor(codes.shift).to(codes.dtype))
        self.register_buffer("step", codes.step.clone())
        self.register_buffer("shifted_zero_point", (codes.zero_point.to(torch.int64) << codes.shift).to(codes.dtype))
        offset = codes.offset
        if offset is not None and codes.axis is not None:
            offset = offset.reshape(1, -1, 1, 1)
        self.register_buffer("offset", offset)

    def forward(self, input: Tensor) -> Tensor:
        x = input if self.offset is None else input - self.offset
        axis = {} if self.axis is None else {"axis": self.axis}
        codes = emit("QuantizeLinear", (x, self.scale, self.zero_point), x.shape, self.dtype, **axis)
        if self.clipped:
            codes = emit("Clip", (codes, self.low, self.high), x.shape, self.dtype, version=13)
        if self.shifted:
            codes = emit("BitShift", (codes, self.shift), x.shape, self.dtype, version=11, direction="LEFT")
        state = (self.step, self.shifted_zero_point)
        values = emit("DequantizeLinear", (codes, *state), x.shape, torch.float32, **axis)
        return values if self.offset is None else values + self.offset


class CodedWeight(nn.Module):
    """DequantizeLinear of a weight's codes, 8 bits each; ``codes`` in the layout of the operation."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, codes: Tensor, weight: WeightCodes, *, axis: int) -> None:
        super().__init__()
        low, high = int(codes.min()), int(codes.max())
        # A negated -128, or unsigned codes, do not fit a signed byte, but an unsigned one after a shift.
        signed = low >= -128 and high <= 127
        shift = 0 if signed else -low
        dtype = torch.int8 if signed else torch.uint8
        if high + shift > torch.iinfo(dtype).max:
            dtype = torch.int16
        self.axis = axis
        uniform = bool((weight.scale == weight.scale[0]).all())
        self.register_buffer("codes", (codes + shift).to(dtype).contiguous())
        scale, zero = weight.scale, weight.zero_point + shift
        if uniform and bool((zero == zero[0]).all()) and axis == 1:
            scale, zero = scale[0], zero[0]
        self.register_buffer("scale", scale.clone())
        self.register_buffer("zero_point", zero.to(dtype).clone())

    def forward(self) -> Tensor:
        axis = {"axis": self.axis} if self.scale.ndim else {}
        state = (self.codes, self.scale, self.zero_point)
        return emit("DequantizeLinear", state, self.codes.shape, torch.float32, **axis)


@dataclass(frozen=True)
class BiasCodes:
    """A bias (O,) in 32 bits, ``codes scale``, where ``scale`` (O,) is that of the sums that it is added to."""

    codes: Tensor
    scale: Tensor

    @staticmethod
    def of(bias: Tensor, scale: Tensor) -> "BiasCodes":
        return BiasCodes((bias.double() / scale.double()).round().to(torch.int32), scale)


class LoweredLayer(nn.Module):
    """``operation(input(x), weight(), bias())`` of the quantized ``layer``, whose own tensors are not used."""

    def __init__(self, layer: nn.Module, input: nn.Module | None, weight: nn.Module, bias: nn.Module | None) -> None:
        super().__init__()
        self._layer = (layer,)  # in a tuple, which hides its tensors
        self.input, self.weight, self.bias = input, weight, bias

    def forward(self, input: Tensor, *further: Any) -> Tensor:
        (layer,) = self._layer
        if isinstance(layer, nn.Embedding):
            return F.embedding(input, self.weight())
        x = input if self.input is None else self.input(input)
        weight, bias = self.weight(), None if self.bias is None else self.bias()
        if isinstance(layer, QuantConv) and isinstance(layer.pad, SamePad):
            return _padded_convolution(layer, x, weight, bias)
        if isinstance(layer, QuantConvTranspose):
            return layer.product(x, weight, bias, *further)
        if isinstance(layer, QuantConv):
            return layer.product(x, weight, bias)
        return F.linear(x, weight, bias)


def _padded_convolution(layer: QuantConv, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution with its own unequal padding inside, since runtimes do not fuse a padding before it."""
    assert isinstance(layer.pad, SamePad)
    before, after = layer.pad.amounts(tuple(x.shape[2:]))
    sizes = [
        (n + b + a - d * (k - 1) - 1) // s + 1
        for n, b, a, d, k, s in zip(
            x.shape[2:], before, after, layer.dilation, layer.kernel_size, layer.stride, strict=True
        )
    ]
    attributes: dict[str, Any] = {
        "pads": [*before, *after], "strides": list(layer.stride), "dilations": list(layer.dilation),
        "group": layer.groups, "kernel_shape": list(layer.kernel_size),
    }  # fmt: skip
    given = (x, weight) if bias is None else (x, weight, bias)
    return emit("Conv", given, (x.shape[0], weight.shape[0], *sizes), torch.float32, **attributes)


def emit(
    operator: str, inputs: tuple[Tensor, ...], shape: Any, dtype: torch.dtype, *, version: int = OPSET, **options: Any
) -> Tensor:
    """The node ``operator`` of ONNX in a graph that is exported."""
    made: Tensor = torch.onnx.ops.symbolic(operator, inputs, options, dtype=dtype, shape=tuple(shape), version=version)
    return made
