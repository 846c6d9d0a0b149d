"""Products with weights, whose sums are proved to fit."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qtrain.deployment.integer import binary
from qtrain.deployment.integer.fixed import (
    ACCUMULATOR,
    CODE,
    EXACT,
    PRODUCT,
    Fixed,
    narrowed,
    of_values,
    shifted,
    uniform,
)
from qtrain.deployment.integer.values import Attributes, fixed_point, window

_CONVOLUTIONS: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED: dict[int, Any] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def convolution(inputs: Sequence[Any], attributes: Attributes) -> Fixed:
    x, weight, bias = _operands(inputs)
    reach = weight.numbers.abs().flatten(1).sum(dim=1)
    x, axes = _fitting(x, reach), weight.numbers.ndim - 2
    strides, dilations, pads = window(attributes, axes)
    numbers, groups = x.numbers, int(attributes.get("group", 1))
    channels = (-1, *(1 for _ in range(axes)))
    signed = binary.convolution(numbers, weight.numbers, strides, pads, dilations, groups)
    if signed is not None:
        return _accumulated(signed, x, weight, reach, bias, channels)
    before, after = pads[:axes], pads[axes:]
    padding: Any = before
    if before != after:
        numbers = F.pad(numbers, [p for pair in zip(reversed(before), reversed(after), strict=True) for p in pair])
        padding = 0
    kind = _carrier(int(reach.max()) * x.bound)
    sums = _CONVOLUTIONS[axes](numbers.to(kind), weight.numbers.to(kind), None, strides, padding, dilations, groups)
    return _accumulated(sums, x, weight, reach, bias, channels)


def transposed_convolution(inputs: Sequence[Any], attributes: Attributes) -> Fixed:
    x, weight, bias = _operands(inputs)
    axes, groups = weight.numbers.ndim - 2, int(attributes.get("group", 1))
    reach = weight.numbers.abs().transpose(0, 1).flatten(1).sum(dim=1).repeat(groups)
    x = _fitting(x, reach)
    strides, dilations, pads = window(attributes, axes)
    if pads[:axes] != pads[axes:]:
        raise ValueError("a transposed convolution with unequal padding has no integer form here")
    extra = list(attributes.get("output_padding", [0] * axes))
    kind = _carrier(int(reach.max()) * x.bound)
    sums = _TRANSPOSED[axes](
        x.numbers.to(kind), weight.numbers.to(kind), None, strides, pads[:axes], extra, groups, dilations
    )
    return _accumulated(sums, x, weight, reach, bias, (-1, *(1 for _ in range(axes))))


def gemm(inputs: Sequence[Any], attributes: Attributes) -> Fixed:
    x, weight, bias = _operands(inputs)
    if attributes.get("transA") or attributes.get("alpha", 1.0) != 1.0 or attributes.get("beta", 1.0) != 1.0:
        raise ValueError("a Gemm with factors has no integer form here")
    numbers = weight.numbers if attributes.get("transB") else weight.numbers.T
    reach = numbers.abs().sum(dim=1)
    x = _fitting(x, reach)
    sums = binary.linear(x.numbers, numbers)
    if sums is None:
        kind = _carrier(int(reach.max()) * x.bound)
        sums = x.numbers.to(kind) @ numbers.to(kind).T
    scale = weight.scale.reshape(-1) if weight.scale.numel() > 1 else weight.scale
    return _accumulated(sums, x, Fixed(numbers, scale, weight.bound), reach, bias, (-1,))


def matmul(inputs: Sequence[Any], attributes: Attributes) -> Fixed:
    """A product of two activations, or of one with a weight (I, O) that may have a scale for each output."""
    left, right = (fixed_point(x) for x in inputs)
    left = uniform(left)
    if right.scale.numel() > 1 and right.scale.numel() != right.scale.shape[-1]:
        right = uniform(right)
    terms = left.shape[-1]
    if (terms * left.bound * right.bound).bit_length() <= ACCUMULATOR:
        kind = _carrier(terms * left.bound * right.bound)
        sums = (left.numbers.to(kind) @ right.numbers.to(kind)).to(torch.int64)
    elif max(left.bound.bit_length(), right.bound.bit_length()) <= CODE:
        raise OverflowError(f"its sums can reach {terms * left.bound * right.bound}, which 32 bits do not hold")
    else:  # of what the student has not quantized, as many bits as sums in 64 leave
        bits = (PRODUCT - terms.bit_length()) // 2
        left, right = narrowed(left, bits), narrowed(right, bits)
        sums = left.numbers @ right.numbers
    return narrowed(Fixed(sums, left.scale * right.scale, terms * left.bound * right.bound), EXACT)


def _carrier(bound: int) -> torch.dtype:
    """The type in which libraries carry out sums of magnitude at most ``bound`` without rounding, and fastest.

    float32 holds every whole number up to 2^24, float64 up to 2^53; so the sums' order does not matter.
    """
    short = bound <= 2**24 and torch.get_float32_matmul_precision() == "highest"
    return torch.float32 if short else torch.float64


def _operands(inputs: Sequence[Any]) -> tuple[Fixed, Fixed, Tensor | Fixed | None]:
    """Input, weight and bias of a product; the weight's scale has an axis only for the outputs."""
    x, weight, bias = (*inputs, None)[:3]
    return uniform(fixed_point(x)), weight if isinstance(weight, Fixed) else of_values(weight, bits=15), bias


def _accumulated(
    sums: Tensor, x: Fixed, weight: Fixed, reach: Tensor, bias: Tensor | Fixed | None, channels: tuple[int, ...]
) -> Fixed:
    """Sums of products in units of both scales, with ``bias``; ``reach`` (O,) are the weights' sums of magnitudes."""
    bound = int(reach.max()) * x.bound
    scale = x.scale * (weight.scale.reshape(channels) if weight.scale.numel() > 1 else weight.scale.reshape(()))
    total = Fixed(sums.to(torch.int64), scale, bound)
    if bias is None:
        return total
    if isinstance(bias, Fixed):  # in units of the sums themselves
        numbers = bias.numbers.reshape(channels)
        return Fixed(total.numbers + numbers, scale, bound + bias.bound)
    return shifted(total, bias.reshape(channels))


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
    return narrowed(x, EXACT - int(reach.max()).bit_length())
