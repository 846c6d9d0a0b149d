"""Modules that emit the operators of ONNX while torch traces them; none computes anything by itself."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtrain.deployment.onnx.forms import Codes
from qtrain.deployment.onnx.weights import WeightCodes
from qtrain.models.layer_kinds import SamePad
from qtrain.nn import QuantConv, QuantConvTranspose

UINT8 = 2
"""The number of unsigned bytes among ONNX's types; a plain installation, which has no onnx, imports this file too."""

OPSET = 21
"""The first with 4-bit and 16-bit codes."""


class Constant(nn.Module):
    """A tensor of the file."""

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value.detach().float().contiguous())

    def forward(self) -> Tensor:
        return self.value


BYTES = (torch.uint8, torch.int8)


class QuantizedInput(nn.Module):
    """QuantizeLinear, a clip and a shift of the codes where the type holds more of them, and DequantizeLinear.

    In front of codes of 16 bits it is the values that are clipped. Signs are compared with their threshold in place of
    QuantizeLinear.
    """

    scale: Tensor
    zero_point: Tensor
    low: Tensor
    high: Tensor
    shift: Tensor
    step: Tensor
    shifted_zero_point: Tensor
    offset: Tensor | None
    threshold: Tensor | None
    reach: Tensor

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
        self.register_buffer("shifted_zero_point", codes.shifted_zero_point)
        self.register_buffer("threshold", codes.threshold)
        self.register_buffer("reach", codes.step.max() * 2**17)
        offset = codes.offset
        if offset is not None and codes.axis is not None:
            offset = offset.reshape(1, -1, 1, 1)
        self.register_buffer("offset", offset)

    def codes(self, input: Tensor) -> Tensor:
        """The codes before they are shifted."""
        x = input if self.offset is None else input - self.offset
        axis = {} if self.axis is None else {"axis": self.axis}
        clipped = self.clipped and self.threshold is None
        if clipped and self.axis is None and self.dtype not in BYTES:  # runtimes clip no codes of 16 bits
            low, high = (
                (end.to(torch.int32) - self.zero_point.to(torch.int32)) * self.scale for end in (self.low, self.high)
            )
            x, clipped = emit("Clip", (x, low, high), x.shape, torch.float32, version=13), False
        if self.threshold is not None:
            above = emit("GreaterOrEqual", (x, self.threshold), x.shape, torch.bool, version=16)
            codes = emit("Cast", (above,), x.shape, self.dtype, to=UINT8)
        else:
            codes = emit("QuantizeLinear", (x, self.scale, self.zero_point), x.shape, self.dtype, **axis)
        if clipped:
            codes = emit("Clip", (codes, self.low, self.high), x.shape, self.dtype, version=13)
        return codes

    def forward(self, input: Tensor) -> Tensor:
        codes, axis = self.codes(input), {} if self.axis is None else {"axis": self.axis}
        if self.shifted:
            codes = emit("BitShift", (codes, self.shift), input.shape, self.dtype, version=11, direction="LEFT")
        state = (self.step, self.shifted_zero_point)
        values = emit("DequantizeLinear", (codes, *state), input.shape, torch.float32, **axis)
        return values if self.offset is None else values + self.offset

    def bounded(self, values: Tensor) -> Tensor:
        """``values``, which no bound changes; a runtime that sees codes in front of a layer whose weights are in
        floating point would quantize these by itself."""
        return emit("Clip", (values, -self.reach, self.reach), values.shape, torch.float32, version=13)


class CodedGate(nn.Module):
    """The gate ``clip(x + 3, 0, 6) / 6`` of a quantized input, or ``x`` times it, without arithmetic for the gate.

    It is the input's codes, clipped to ``steps`` on both sides of zero, that are read with another scale and zero point
    (:func:`qtrain.deployment.onnx.forms.gate_steps`).
    """

    low: Tensor
    high: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, input: nn.Module, codes: Codes, *, steps: int, swish: bool) -> None:
        super().__init__()
        self.input, self.swish, self.dtype = input, swish, codes.dtype
        low = int(codes.zero_point) - steps
        high = min(int(codes.zero_point) + steps, codes.high)
        self.clipped = low > codes.low or high < codes.high
        for name, value in (("low", low), ("high", high), ("zero_point", low)):
            self.register_buffer(name, torch.tensor(value).to(codes.dtype))
        self.register_buffer("scale", codes.scale / 6)

    def forward(self, input: Tensor, *further: Any, **options: Any) -> Tensor:
        assert isinstance(self.input, QuantizedInput)
        values, codes = self.input(input), self.input.codes(input)
        if self.clipped:
            codes = emit("Clip", (codes, self.low, self.high), input.shape, self.dtype, version=13)
        gate = emit("DequantizeLinear", (codes, self.scale, self.zero_point), input.shape, torch.float32)
        return values * gate if self.swish else gate


class CodedWeight(nn.Module):
    """DequantizeLinear of a weight's codes, 8 bits each; ``codes`` in the layout of the operation."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, codes: Tensor, weight: WeightCodes, *, axis: int) -> None:
        super().__init__()
        low, high = (int(torch.cat([codes.flatten(), weight.zero_point]).aminmax()[end]) for end in (0, 1))
        # What a signed byte does not hold, a negated -128 or unsigned codes, an unsigned one holds after a shift.
        dtype, shift = (torch.int8, 0) if low >= -128 and high <= 127 else (torch.uint8, -low)
        if high + shift > 255:
            dtype, shift = torch.int16, 0
        # One scale where one does, since the outputs of a transposed convolution in groups have no axis of their own.
        one = axis == 1 and weight.uniform
        self.axis = None if one else axis
        self.register_buffer("codes", (codes + shift).to(dtype).contiguous())
        self.register_buffer("scale", (weight.scale[0] if one else weight.scale).clone())
        self.register_buffer("zero_point", ((weight.zero_point[0] if one else weight.zero_point) + shift).to(dtype))

    def forward(self) -> Tensor:
        axis = {} if self.axis is None else {"axis": self.axis}
        state = (self.codes, self.scale, self.zero_point)
        return emit("DequantizeLinear", state, self.codes.shape, torch.float32, **axis)


class LoweredLayer(nn.Module):
    """``operation(input(tensor(x)), weight(), bias())`` of the quantized ``layer``, whose own tensors are not used.

    ``tensor`` quantizes what another layer reads with more bits.
    """

    def __init__(
        self,
        layer: nn.Module,
        input: nn.Module | None,
        weight: nn.Module,
        bias: Tensor | None,
        tensor: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self._layer = (layer,)  # in a tuple, which hides its tensors
        self.tensor, self.input = tensor, input
        self.weight, self.bias = weight, None if bias is None else Constant(bias)

    def forward(self, input: Tensor, *further: Any) -> Tensor:
        (layer,) = self._layer
        if isinstance(layer, nn.Embedding):
            return F.embedding(input, self.weight())
        x = input if self.tensor is None else self.tensor(input)
        x = x if self.input is None else self.input(x)
        if isinstance(self.weight, Constant) and isinstance(self.input, QuantizedInput):
            x = self.input.bounded(x)
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
