"""Pools and averages: sums in units of a share of the scale, so that nothing is divided."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qtrain.deployment.integer.fixed import WIDE, Fixed, multiplied, narrowed, uniform, widened
from qtrain.deployment.integer.values import Attributes, window

_MAX_POOLS: dict[int, Any] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


def max_pool(inputs: Sequence[Any], attributes: Attributes) -> Fixed:
    (x,) = inputs
    kernel = list(attributes["kernel_shape"])
    strides, dilations, pads = window(attributes, len(kernel))
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
    strides, _, pads = window(attributes, len(kernel))
    left_over = [
        (n + before + after - k) % s
        for n, before, after, k, s in zip(x.shape[2:], pads, pads[len(kernel) :], kernel, strides, strict=False)
    ]
    if len(kernel) != 2 or (attributes.get("ceil_mode", 0) and any(left_over)):
        raise ValueError("an average pool over windows that stick out has no integer form here")
    ones = torch.ones(1, 1, *kernel, dtype=torch.float64)
    amounts = [pads[1], pads[3], pads[0], pads[2]]

    def sums(numbers: Tensor) -> Tensor:
        flat = F.pad(numbers, amounts).double().flatten(0, 1).unsqueeze(1)
        pooled = F.conv2d(flat, ones, stride=strides).squeeze(1)
        return pooled.to(torch.int64).reshape(*numbers.shape[:2], *pooled.shape[1:])

    area = kernel[0] * kernel[1]
    total = Fixed(sums(x.numbers), x.scale, x.bound * area)
    if attributes.get("count_include_pad", 0) or not any(pads):
        return Fixed(total.numbers, total.scale / area, total.bound)
    total = widened(total)
    counted = sums(torch.ones(1, 1, *x.shape[2:], dtype=torch.int64))
    numbers = multiplied(total.numbers, area / counted.double(), total.bound)
    return Fixed(numbers, total.scale / area, total.bound)


def mean(inputs: Sequence[Any], attributes: Attributes) -> Fixed:
    """The sum, in units of a share of the scale: nothing is divided."""
    x = uniform(inputs[0])
    axes = _axes(inputs, attributes)
    number = 1
    for axis in axes:
        number *= x.shape[axis]
    numbers = x.numbers.sum(dim=axes, keepdim=bool(attributes.get("keepdims", 1)))
    return narrowed(Fixed(numbers, x.scale / number, x.bound * number), WIDE)


def largest(inputs: Sequence[Any], attributes: Attributes) -> Fixed:
    x = uniform(inputs[0])
    return Fixed(x.numbers.amax(_axes(inputs, attributes), bool(attributes.get("keepdims", 1))), x.scale, x.bound)


def _axes(inputs: Sequence[Any], attributes: Attributes) -> list[int]:
    """The axes that are reduced: a second input or an attribute; all where neither is there."""
    axes = inputs[1].tolist() if len(inputs) > 1 and inputs[1] is not None else attributes.get("axes")
    return [axes] if isinstance(axes, int) else list(axes) if axes is not None else list(range(len(inputs[0].shape)))


def global_average_pool(inputs: Sequence[Any], attributes: Attributes) -> Fixed:
    axes = torch.arange(2, inputs[0].numbers.ndim)
    return mean([inputs[0], axes], {"keepdims": 1})
