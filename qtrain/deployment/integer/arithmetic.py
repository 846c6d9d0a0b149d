"""Sums, products and activation functions, number by number."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qtrain.deployment.integer.fixed import (
    PRODUCT,
    WIDE,
    Fixed,
    constant,
    multiplied,
    narrowed,
    scaled,
    shifted,
    summed,
    uniform,
    widened,
)
from qtrain.deployment.integer.values import Attributes, Operator, Value, fixed_point

_STEP, _BETWEEN = 12, 16
"""Bits of a table's argument behind the point, and of the place between two of its entries."""


def add(inputs: Sequence[Any], attributes: Attributes) -> Value:
    left, right = inputs
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return torch.add(left, right)
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        x, values = (right, left) if isinstance(left, Tensor) else (left, right)
        return shifted(x, values)
    return summed(left, right)


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
        x = narrowed(x, WIDE)
        gate = narrowed(gate, PRODUCT - x.bound.bit_length())
        product = Fixed(gate.numbers * x.numbers, gate.scale * x.scale, gate.bound * x.bound)
        return narrowed(product, WIDE)
    x, values = (right, left) if isinstance(left, Tensor) else (left, right)
    return scaled(x, values)


def divide(inputs: Sequence[Any], attributes: Attributes) -> Value:
    left, right = inputs
    if isinstance(right, Fixed):
        raise ValueError("a quotient of two activations has no integer form")
    if isinstance(left, Tensor):
        return torch.div(left, right, rounding_mode=None if left.is_floating_point() else "floor")
    return scaled(left, 1 / right.double())


def batch_normalization(inputs: Sequence[Any], attributes: Attributes) -> Fixed:
    x, gamma, beta, mean, variance = inputs
    factor = gamma.double() / (variance.double() + attributes.get("epsilon", 1e-5)).sqrt()
    channels = (-1, *(1 for _ in x.shape[2:]))
    shift = (beta.double() - mean.double() * factor).reshape(channels)
    return shifted(scaled(fixed_point(x), factor.reshape(channels)), shift)


def relu(inputs: Sequence[Any], attributes: Attributes) -> Fixed:
    (x,) = inputs
    return Fixed(x.numbers.clamp(min=0), x.scale, x.bound)


def clip(inputs: Sequence[Any], attributes: Attributes) -> Value:
    x, low, high = (*inputs, None, None)[:3]
    if isinstance(x, Tensor):
        return x.clamp(None if low is None else low.to(x.dtype), None if high is None else high.to(x.dtype))
    assert isinstance(x, Fixed)
    reach = x.bound * float(x.scale.max())
    if (low is None or float(low.min()) <= -reach) and (high is None or float(high.max()) >= reach):
        return x
    x = widened(x)  # the ends are no multiples of its scale
    numbers, ends = x.numbers, []
    for end, nearer in ((low, torch.maximum), (high, torch.minimum)):
        if end is not None:
            limit = constant(end, x.scale)
            numbers = nearer(numbers, limit.numbers)
            ends.append(limit.bound)
    return Fixed(numbers, x.scale, min(x.bound, max(ends)) if len(ends) == 2 else x.bound)


def hard_sigmoid(inputs: Sequence[Any], attributes: Attributes) -> Fixed:
    slope, offset = float(attributes.get("alpha", 0.2)), float(attributes.get("beta", 0.5))
    inner = shifted(scaled(inputs[0], torch.tensor(slope)), torch.tensor(offset))
    limited = clip([inner, torch.tensor(0.0), torch.tensor(1.0)], {})
    assert isinstance(limited, Fixed)
    return limited


def hard_swish(inputs: Sequence[Any], attributes: Attributes) -> Value:
    gate = hard_sigmoid(inputs, {"alpha": 1 / 6, "beta": 0.5})
    return multiply([inputs[0], gate], {})


def leaky_relu(inputs: Sequence[Any], attributes: Attributes) -> Fixed:
    x = widened(inputs[0])
    slope = torch.tensor(float(attributes.get("alpha", 0.01)), dtype=torch.float64)
    numbers = torch.where(x.numbers < 0, multiplied(x.numbers, slope, x.bound), x.numbers)
    return Fixed(numbers, x.scale, x.bound)


def prelu(inputs: Sequence[Any], attributes: Attributes) -> Fixed:
    """Negative numbers times a constant of the network, one or one for each channel."""
    x, slope = widened(uniform(inputs[0])), inputs[1].double()
    negative = multiplied(x.numbers, slope.abs(), x.bound) * torch.where(slope < 0, -1, 1)
    largest = max(1.0, float(slope.abs().max()))
    return Fixed(torch.where(x.numbers < 0, negative, x.numbers), x.scale, int(x.bound * largest) + 1)


def absolute(inputs: Sequence[Any], attributes: Attributes) -> Fixed:
    (x,) = inputs
    return Fixed(x.numbers.abs(), x.scale, x.bound)


def table(function: Callable[[Tensor], Tensor]) -> Operator:
    """A bounded function as a table over [-16, 16], where all such functions have reached their limits.

    Between two entries, ``2^-12`` apart, it is a straight line, which is off by less than ``2^-26``.
    """
    step = torch.tensor(2.0**-_STEP, dtype=torch.float64)
    largest = 2 ** (4 + _STEP)
    values = constant(function((torch.arange(-largest, largest + 1)).double() * step), step / 2 ** (30 - _STEP))
    rises = values.numbers.diff(append=values.numbers[-1:])

    def operator(inputs: Sequence[Any], attributes: Attributes) -> Fixed:
        x = fixed_point(inputs[0])
        limit = 16 / float(x.scale.min())
        numbers, bound = x.numbers, x.bound
        if limit < bound:
            bound = int(limit) + 1
            numbers = numbers.clamp(-bound, bound)
        place = multiplied(numbers, x.scale / step * 2**_BETWEEN, bound).clamp(
            -largest << _BETWEEN, largest << _BETWEEN
        )
        index = (place >> _BETWEEN) + largest
        rise = (rises[index] * (place % 2**_BETWEEN) + 2 ** (_BETWEEN - 1)) >> _BETWEEN
        return Fixed(values.numbers[index] + rise, values.scale, values.bound)

    return operator
