"""The operators of an exported network on integers, one function each.

A function takes the values of a node's inputs and its attributes. A value is a :class:`Fixed`, codes or shapes as
whole numbers (int64), or a constant of the network as floating-point numbers, which become integers where they are
used. What has no function here has no integer form: an exponential, for instance.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qtrain.export.integer.fixed import (
    ACCUMULATOR,
    CODE,
    EXACT,
    PRODUCT,
    WIDE,
    Fixed,
    constant,
    multiplied,
    of_values,
    rescaled,
    uniform,
    unit,
)

Value = Fixed | Tensor
Attributes = Mapping[str, Any]
Operator = Callable[[Sequence[Any], Attributes], Value]

_CONVOLUTIONS: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED: dict[int, Any] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_MAX_POOLS: dict[int, Any] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


def quantize_linear(inputs: Sequence[Any], attributes: Attributes) -> Tensor:
    """Codes, int64: ``clamp(round(x / scale) + zero_point)``, a tie to the even number."""
    x, scale, zero = inputs
    info = torch.iinfo(zero.dtype)
    scale, offset = (_on_axis(t, x.shape, int(attributes.get("axis", 1))) for t in (scale, zero.to(torch.int64)))
    if isinstance(x, Fixed):
        codes = multiplied(x.numbers, x.scale / scale.double(), x.bound)
    else:
        codes = (x / scale).round().to(torch.int64)  # the image itself
    return (codes + offset).clamp(info.min, info.max)


def dequantize_linear(inputs: Sequence[Any], attributes: Attributes) -> Fixed:
    codes, scale, zero = inputs
    info = torch.iinfo(zero.dtype)
    scale, offset = (_on_axis(t, codes.shape, int(attributes.get("axis", 1))) for t in (scale, zero.to(torch.int64)))
    numbers = codes.to(torch.int64) - offset
    # Codes of the network are known, those of an image are not.
    bound = (
        int(numbers.abs().max())
        if zero.ndim or codes.dtype != torch.int64
        else max(info.max - int(zero), int(zero) - info.min)
    )
    return Fixed(numbers, scale.double(), bound)


def convolution(inputs: Sequence[Any], attributes: Attributes) -> Fixed:
    x, weight, bias = _operands(inputs)
    reach = weight.numbers.abs().flatten(1).sum(dim=1)
    x, axes = _fitting(x, reach), weight.numbers.ndim - 2
    strides, dilations, pads = _window(attributes, axes)
    numbers, groups = x.numbers, int(attributes.get("group", 1))
    before, after = pads[:axes], pads[axes:]
    padding: Any = before
    if before != after:
        numbers = F.pad(numbers, [p for pair in zip(reversed(before), reversed(after), strict=True) for p in pair])
        padding = 0
    sums = _CONVOLUTIONS[axes](numbers.double(), weight.numbers.double(), None, strides, padding, dilations, groups)
    return _accumulated(sums, x, weight, reach, bias, (-1, *(1 for _ in range(axes))))


def transposed_convolution(inputs: Sequence[Any], attributes: Attributes) -> Fixed:
    x, weight, bias = _operands(inputs)
    axes, groups = weight.numbers.ndim - 2, int(attributes.get("group", 1))
    reach = weight.numbers.abs().transpose(0, 1).flatten(1).sum(dim=1).repeat(groups)
    x = _fitting(x, reach)
    strides, dilations, pads = _window(attributes, axes)
    if pads[:axes] != pads[axes:]:
        raise ValueError("a transposed convolution with unequal padding has no integer form here")
    extra = list(attributes.get("output_padding", [0] * axes))
    sums = _TRANSPOSED[axes](
        x.numbers.double(), weight.numbers.double(), None, strides, pads[:axes], extra, groups, dilations
    )
    return _accumulated(sums, x, weight, reach, bias, (-1, *(1 for _ in range(axes))))


def gemm(inputs: Sequence[Any], attributes: Attributes) -> Fixed:
    x, weight, bias = _operands(inputs)
    if attributes.get("transA") or attributes.get("alpha", 1.0) != 1.0 or attributes.get("beta", 1.0) != 1.0:
        raise ValueError("a Gemm with factors has no integer form here")
    numbers = weight.numbers if attributes.get("transB") else weight.numbers.T
    reach = numbers.abs().sum(dim=1)
    x = _fitting(x, reach)
    sums = x.numbers.double() @ numbers.double().T
    scale = weight.scale.reshape(-1) if weight.scale.numel() > 1 else weight.scale
    return _accumulated(sums, x, Fixed(numbers, scale, weight.bound), reach, bias, (-1,))


def matmul(inputs: Sequence[Any], attributes: Attributes) -> Fixed:
    left, right = (uniform(_fixed(x)) for x in inputs)
    terms = torch.tensor(left.shape[-1])
    left = _fitting(left, terms * right.bound)
    right = _fitting(right, terms * left.bound)
    bound = left.bound * right.bound * left.shape[-1]
    sums = left.numbers.double() @ right.numbers.double()
    return Fixed(sums.to(torch.int64), left.scale * right.scale, bound)


def add(inputs: Sequence[Any], attributes: Attributes) -> Value:
    left, right = inputs
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return torch.add(left, right)
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        x, values = (right, left) if isinstance(left, Tensor) else (left, right)
        return _shifted(x, values)
    return _sum(left, right)


def subtract(inputs: Sequence[Any], attributes: Attributes) -> Value:
    left, right = inputs
    negative = Fixed(-right.numbers, right.scale, right.bound) if isinstance(right, Fixed) else -right
    return add([left, negative], attributes)


def multiply(inputs: Sequence[Any], attributes: Attributes) -> Value:
    left, right = inputs
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return torch.mul(left, right)
    if isinstance(left, Fixed) and isinstance(right, Fixed):
        # A gate, which is close to its bound, gives up bits rather than what it multiplies.
        gate, x = sorted((uniform(left), uniform(right)), key=lambda value: value.bound * float(value.scale))
        x = _narrowed(x, WIDE)
        gate = _narrowed(gate, PRODUCT - x.bound.bit_length())
        product = Fixed(gate.numbers * x.numbers, gate.scale * x.scale, gate.bound * x.bound)
        return _narrowed(product, WIDE)
    x, values = (right, left) if isinstance(left, Tensor) else (left, right)
    return _scaled(x, values)


def divide(inputs: Sequence[Any], attributes: Attributes) -> Value:
    left, right = inputs
    if isinstance(right, Fixed):
        raise ValueError("a quotient of two activations has no integer form")
    if isinstance(left, Tensor):
        return torch.div(left, right, rounding_mode=None if left.is_floating_point() else "floor")
    return _scaled(left, 1 / right.double())


def batch_normalization(inputs: Sequence[Any], attributes: Attributes) -> Fixed:
    x, gamma, beta, mean, variance = inputs
    factor = gamma.double() / (variance.double() + attributes.get("epsilon", 1e-5)).sqrt()
    channels = (-1, *(1 for _ in x.shape[2:]))
    shift = (beta.double() - mean.double() * factor).reshape(channels)
    return _shifted(_scaled(_fixed(x), factor.reshape(channels)), shift)


def relu(inputs: Sequence[Any], attributes: Attributes) -> Fixed:
    (x,) = inputs
    return Fixed(x.numbers.clamp(min=0), x.scale, x.bound)


def clip(inputs: Sequence[Any], attributes: Attributes) -> Value:
    x, low, high = (*inputs, None, None)[:3]
    if isinstance(x, Tensor):
        return x.clamp(None if low is None else low.to(x.dtype), None if high is None else high.to(x.dtype))
    x = _widened(x)  # the ends are no multiples of its scale
    numbers, ends = x.numbers, []
    for end, nearer in ((low, torch.maximum), (high, torch.minimum)):
        if end is not None:
            limit = constant(end, x.scale)
            numbers = nearer(numbers, limit.numbers)
            ends.append(limit.bound)
    return Fixed(numbers, x.scale, min(x.bound, max(ends)) if len(ends) == 2 else x.bound)


def hard_sigmoid(inputs: Sequence[Any], attributes: Attributes) -> Fixed:
    slope, offset = float(attributes.get("alpha", 0.2)), float(attributes.get("beta", 0.5))
    inner = _shifted(_scaled(inputs[0], torch.tensor(slope)), torch.tensor(offset))
    limited = clip([inner, torch.tensor(0.0), torch.tensor(1.0)], {})
    assert isinstance(limited, Fixed)
    return limited


def hard_swish(inputs: Sequence[Any], attributes: Attributes) -> Value:
    gate = hard_sigmoid(inputs, {"alpha": 1 / 6, "beta": 0.5})
    return multiply([inputs[0], gate], {})


def leaky_relu(inputs: Sequence[Any], attributes: Attributes) -> Fixed:
    x = _widened(inputs[0])
    slope = torch.tensor(float(attributes.get("alpha", 0.01)), dtype=torch.float64)
    numbers = torch.where(x.numbers < 0, multiplied(x.numbers, slope, x.bound), x.numbers)
    return Fixed(numbers, x.scale, x.bound)


def _table(function: Callable[[Tensor], Tensor]) -> Operator:
    """A bounded function as a table over [-16, 16), where all such functions have reached their limits."""
    step = torch.tensor(2.0**-15, dtype=torch.float64)
    largest = 2**19
    table = constant(function((torch.arange(-largest, largest) + 0.0).double() * step), step / 2**13)

    def operator(inputs: Sequence[Any], attributes: Attributes) -> Fixed:
        x = _fixed(inputs[0])
        index = multiplied(x.numbers, x.scale / step, x.bound).clamp(-largest, largest - 1) + largest
        return Fixed(table.numbers[index], table.scale, table.bound)

    return operator


def max_pool(inputs: Sequence[Any], attributes: Attributes) -> Fixed:
    (x,) = inputs
    kernel = list(attributes["kernel_shape"])
    strides, dilations, pads = _window(attributes, len(kernel))
    numbers, before, after = x.numbers, pads[: len(kernel)], pads[len(kernel) :]
    if any(pads):
        amounts = [p for pair in zip(reversed(before), reversed(after), strict=True) for p in pair]
        numbers = F.pad(numbers, amounts, value=-x.bound - 1)
    ceil = bool(attributes.get("ceil_mode", 0))
    numbers = _MAX_POOLS[len(kernel)](numbers, kernel, strides, 0, dilations, ceil)
    return Fixed(numbers, x.scale, x.bound)


def average_pool(inputs: Sequence[Any], attributes: Attributes) -> Fixed:
    (x,) = inputs
    kernel = list(attributes["kernel_shape"])
    strides, _, pads = _window(attributes, len(kernel))
    left_over = [
        (n + before + after - k) % s
        for n, before, after, k, s in zip(x.shape[2:], pads, pads[len(kernel) :], kernel, strides, strict=False)
    ]
    if len(kernel) != 2 or (attributes.get("ceil_mode", 0) and any(left_over)):
        raise ValueError("an average pool over windows that stick out has no integer form here")
    window = torch.ones(1, 1, *kernel, dtype=torch.float64)
    amounts = [pads[1], pads[3], pads[0], pads[2]]

    def sums(numbers: Tensor) -> Tensor:
        flat = F.pad(numbers, amounts).double().flatten(0, 1).unsqueeze(1)
        pooled = F.conv2d(flat, window, stride=strides).squeeze(1)
        return pooled.to(torch.int64).reshape(*numbers.shape[:2], *pooled.shape[1:])

    area = kernel[0] * kernel[1]
    total = Fixed(sums(x.numbers), x.scale, x.bound * area)
    if attributes.get("count_include_pad", 0) or not any(pads):
        return Fixed(total.numbers, total.scale / area, total.bound)
    total = _widened(total)
    counted = sums(torch.ones(1, 1, *x.shape[2:], dtype=torch.int64))
    numbers = multiplied(total.numbers, area / counted.double(), total.bound)
    return Fixed(numbers, total.scale / area, total.bound)


def mean(inputs: Sequence[Any], attributes: Attributes) -> Fixed:
    """The sum, in units of a share of the scale: nothing is divided."""
    x = uniform(inputs[0])
    axes = inputs[1].tolist() if len(inputs) > 1 and inputs[1] is not None else attributes.get("axes")
    axes = [axes] if isinstance(axes, int) else list(axes) if axes is not None else list(range(x.numbers.ndim))
    number = 1
    for axis in axes:
        number *= x.shape[axis]
    numbers = x.numbers.sum(dim=axes, keepdim=bool(attributes.get("keepdims", 1)))
    return _narrowed(Fixed(numbers, x.scale / number, x.bound * number), WIDE)


def global_average_pool(inputs: Sequence[Any], attributes: Attributes) -> Fixed:
    axes = torch.arange(2, inputs[0].numbers.ndim)
    return mean([inputs[0], axes], {"keepdims": 1})


def concatenate(inputs: Sequence[Any], attributes: Attributes) -> Value:
    axis = int(attributes["axis"])
    if all(isinstance(x, Tensor) for x in inputs):
        return torch.cat([x.reshape(-1) if x.ndim == 0 else x for x in inputs], dim=axis)
    parts = [uniform(_fixed(x)) for x in inputs]
    if any(not torch.equal(part.scale, parts[0].scale) for part in parts):
        largest = max(parts, key=lambda part: part.bound * float(part.scale))
        scale = unit(largest)
        parts = [rescaled(part, scale) for part in parts]
    return Fixed(torch.cat([part.numbers for part in parts], dim=axis), parts[0].scale, max(p.bound for p in parts))


def _moved(change: Callable[[Tensor, Sequence[Any], Attributes], Tensor]) -> Operator:
    """An operator that only moves numbers."""

    def operator(inputs: Sequence[Any], attributes: Attributes) -> Value:
        x = inputs[0]
        if isinstance(x, Tensor):
            return change(x, inputs, attributes)
        x = uniform(x)
        return Fixed(change(x.numbers, inputs, attributes), x.scale, x.bound)

    return operator


def _reshape(x: Tensor, inputs: Sequence[Any], attributes: Attributes) -> Tensor:
    shape = [
        x.shape[i] if n == 0 and not attributes.get("allowzero", 0) else n for i, n in enumerate(inputs[1].tolist())
    ]
    return x.reshape(shape)


def _flatten(x: Tensor, inputs: Sequence[Any], attributes: Attributes) -> Tensor:
    axis = int(attributes.get("axis", 1))
    return x.reshape(int(torch.tensor(x.shape[:axis]).prod()), -1)


def _transpose(x: Tensor, inputs: Sequence[Any], attributes: Attributes) -> Tensor:
    return x.permute(*attributes.get("perm", range(x.ndim - 1, -1, -1)))


def _squeeze(x: Tensor, inputs: Sequence[Any], attributes: Attributes) -> Tensor:
    axes = inputs[1].tolist() if len(inputs) > 1 else [i for i, n in enumerate(x.shape) if n == 1]
    return x.squeeze(tuple(axes) if isinstance(axes, list) else axes)


def _unsqueeze(x: Tensor, inputs: Sequence[Any], attributes: Attributes) -> Tensor:
    for axis in sorted(inputs[1].reshape(-1).tolist()):
        x = x.unsqueeze(axis)
    return x


def _slice(x: Tensor, inputs: Sequence[Any], attributes: Attributes) -> Tensor:
    starts, ends = inputs[1].tolist(), inputs[2].tolist()
    axes = inputs[3].tolist() if len(inputs) > 3 else list(range(len(starts)))
    steps = inputs[4].tolist() if len(inputs) > 4 else [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        chosen = torch.arange(x.shape[axis])[slice(start, end if abs(end) < 2**62 else None, step)]
        x = x.index_select(axis, chosen)
    return x


def _pad(x: Tensor, inputs: Sequence[Any], attributes: Attributes) -> Tensor:
    mode = attributes.get("mode", "constant")
    amounts = inputs[1].tolist()
    before, after = amounts[: x.ndim], amounts[x.ndim :]
    if mode != "constant" or (len(inputs) > 2 and inputs[2] is not None and bool(inputs[2].any())):
        raise ValueError(f"a padding of mode {mode} has no integer form here")
    return F.pad(x, [p for pair in zip(reversed(before), reversed(after), strict=True) for p in pair])


def _gather(x: Tensor, inputs: Sequence[Any], attributes: Attributes) -> Tensor:
    index, axis = inputs[1], int(attributes.get("axis", 0)) % x.ndim
    chosen = x.index_select(axis, index.reshape(-1) % x.shape[axis])
    return chosen.reshape(*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])


def _expand(x: Tensor, inputs: Sequence[Any], attributes: Attributes) -> Tensor:
    return x.expand(torch.broadcast_shapes(x.shape, tuple(inputs[1].tolist())))


def shape(inputs: Sequence[Any], attributes: Attributes) -> Tensor:
    return torch.tensor(inputs[0].shape, dtype=torch.int64)[attributes.get("start", 0) : attributes.get("end")]


def identity(inputs: Sequence[Any], attributes: Attributes) -> Value:
    value: Value = inputs[0]
    return value


OPERATORS: dict[str, Operator] = {
    "Add": add,
    "AveragePool": average_pool,
    "BatchNormalization": batch_normalization,
    "Cast": identity,
    "Clip": clip,
    "Concat": concatenate,
    "Conv": convolution,
    "ConvTranspose": transposed_convolution,
    "DequantizeLinear": dequantize_linear,
    "Div": divide,
    "Dropout": identity,
    "Erf": _table(torch.erf),
    "Expand": _moved(_expand),
    "Flatten": _moved(_flatten),
    "Gather": _moved(_gather),
    "Gemm": gemm,
    "GlobalAveragePool": global_average_pool,
    "HardSigmoid": hard_sigmoid,
    "HardSwish": hard_swish,
    "Identity": identity,
    "LeakyRelu": leaky_relu,
    "MatMul": matmul,
    "MaxPool": max_pool,
    "Mul": multiply,
    "Pad": _moved(_pad),
    "QuantizeLinear": quantize_linear,
    "ReduceMean": mean,
    "Relu": relu,
    "Reshape": _moved(_reshape),
    "Shape": shape,
    "Sigmoid": _table(torch.sigmoid),
    "Slice": _moved(_slice),
    "Squeeze": _moved(_squeeze),
    "Sub": subtract,
    "Tanh": _table(torch.tanh),
    "Transpose": _moved(_transpose),
    "Unsqueeze": _moved(_unsqueeze),
}
"""Kind of node -> its function."""


def _fixed(value: Value) -> Fixed:
    return value if isinstance(value, Fixed) else of_values(value)


def _operands(inputs: Sequence[Any]) -> tuple[Fixed, Fixed, Tensor | Fixed | None]:
    """Input, weight and bias of a product; the weight's scale has an axis only for the outputs."""
    x, weight, bias = (*inputs, None)[:3]
    return uniform(_fixed(x)), weight if isinstance(weight, Fixed) else of_values(weight, bits=15), bias


def _accumulated(
    sums: Tensor, x: Fixed, weight: Fixed, reach: Tensor, bias: Tensor | Fixed | None, channels: tuple[int, ...]
) -> Fixed:
    """Sums of products in units of both scales, with ``bias``; ``reach`` (O,) are the weights' sums of magnitudes.

    The sums were carried out in float64, which holds every whole number below 2^53.
    """
    bound = int(reach.max()) * x.bound
    scale = x.scale * (weight.scale.reshape(channels) if weight.scale.numel() > 1 else weight.scale.reshape(()))
    total = Fixed(sums.to(torch.int64), scale, bound)
    if bias is None:
        return total
    if isinstance(bias, Fixed):  # in units of the sums themselves
        numbers = bias.numbers.reshape(channels)
        return Fixed(total.numbers + numbers, scale, bound + bias.bound)
    return _shifted(total, bias.reshape(channels))


def _fitting(x: Fixed, reach: Tensor) -> Fixed:
    """``x`` such that its products' sums fit; ``reach`` are the sums of the factors' magnitudes.

    Sums of codes must fit 32 bits, or ``OverflowError`` is raised. What the student has not quantized is wider, and
    its sums have 52 bits, to which it is rounded.
    """
    bound = int(reach.max()) * x.bound
    if bound.bit_length() <= ACCUMULATOR:
        return x
    if x.bound.bit_length() <= CODE:
        raise OverflowError(f"its sums can reach {bound}, which {ACCUMULATOR + 1} bits do not hold")
    return _narrowed(x, EXACT - int(reach.max()).bit_length())


def _shifted(x: Fixed, values: Tensor) -> Fixed:
    """``x + values`` with constants that are rounded to a small share of the scale."""
    largest = x.bound + int((values.abs().double() / x.scale).max()) + 1
    fraction = max(0, WIDE - largest.bit_length())
    scale = x.scale / 2**fraction
    added = constant(values, scale)
    return Fixed((x.numbers << fraction) + added.numbers, scale, (x.bound << fraction) + added.bound)


def _scaled(x: Fixed, values: Tensor) -> Fixed:
    """``x values`` with constants, one or one for each channel: the numbers stay, the scale changes."""
    values = values.double()
    if values.numel() == 1 and values.ndim:
        values = values.reshape(())
    sign = torch.where(values < 0, -1, 1)
    magnitude = values.abs()
    live = magnitude > 0
    numbers = x.numbers * sign * live
    return Fixed(numbers, x.scale * torch.where(live, magnitude, torch.ones_like(magnitude)), x.bound)


def _sum(left: Fixed, right: Fixed) -> Fixed:
    if left.scale.numel() == right.scale.numel() == 1 and bool(left.scale == right.scale):
        return Fixed(left.numbers + right.numbers, left.scale, left.bound + right.bound)
    scale = unit(left, right)
    left, right = rescaled(left, scale), rescaled(right, scale)
    return Fixed(left.numbers + right.numbers, scale, left.bound + right.bound)


def _widened(x: Fixed) -> Fixed:
    """``x`` in units that are finer by a power of two, up to :data:`WIDE` bits."""
    fraction = max(0, WIDE - x.bound.bit_length())
    return Fixed(x.numbers << fraction, x.scale / 2**fraction, x.bound << fraction)


def _narrowed(x: Fixed, bits: int) -> Fixed:
    """``x`` in at most ``bits`` bits."""
    over = x.bound.bit_length() - bits
    return x if over <= 0 else rescaled(x, x.scale * 2**over, bits=bits + 1)


def _window(attributes: Attributes, axes: int) -> tuple[list[int], list[int], list[int]]:
    """Strides, dilations, and zeros before each axis and after each."""
    if attributes.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise ValueError("automatic padding has no integer form here")
    return (
        list(attributes.get("strides", [1] * axes)),
        list(attributes.get("dilations", [1] * axes)),
        list(attributes.get("pads", [0] * 2 * axes)),
    )


def _on_axis(state: Tensor, shape: Sequence[int], axis: int) -> Tensor:
    """A scale or zero point as it broadcasts against a tensor of ``shape``."""
    if state.numel() == 1:
        return state.reshape(())
    return state.reshape([-1 if i == axis % len(shape) else 1 for i in range(len(shape))])
