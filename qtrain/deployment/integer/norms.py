"""Norms whose statistics are those of the image at hand: layer, group and instance norm, with integers.

The shifts depend on the numbers that are normalized together, as those of block floating point do.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch

from qtrain.deployment.integer.fixed import WIDE, Fixed, narrowed, scaled, shifted, uniform
from qtrain.deployment.integer.roots import FRACTION, bit_length, moved, reciprocal_root
from qtrain.deployment.integer.values import Attributes, fixed_point
from qtrain.deployment.onnx.forms import along


def layer_normalization(inputs: Sequence[Any], attributes: Attributes) -> Fixed:
    """``(x - mean) / sqrt(var + eps) gamma + beta`` over the axes from ``axis`` on."""
    x, gamma, beta = (*inputs, None)[:3]
    x, axis = narrowed(uniform(fixed_point(x)), WIDE), int(attributes.get("axis", -1))
    result = normalized(x, axis % x.numbers.ndim, _epsilon(attributes))
    result = result if gamma is None else uniform(scaled(result, gamma))
    return result if beta is None else shifted(result, beta)


def group_normalization(inputs: Sequence[Any], attributes: Attributes) -> Fixed:
    """As :func:`layer_normalization` over each of ``num_groups`` parts of the channels, and all places, of an image.

    ``gamma`` and ``beta`` have a number for each channel, or, before opset 21, for each group.
    """
    x, gamma, beta = inputs
    return _by_groups(x, gamma, beta, int(attributes["num_groups"]), _epsilon(attributes))


def instance_normalization(inputs: Sequence[Any], attributes: Attributes) -> Fixed:
    """As :func:`group_normalization` with each channel a group of its own."""
    x, gamma, beta = inputs
    return _by_groups(x, gamma, beta, x.shape[1], _epsilon(attributes))


def normalized(x: Fixed, axis: int, epsilon: float) -> Fixed:
    """``(x - mean) / sqrt(var + eps)`` over the axes from ``axis`` on, of numbers that have one scale.

    With ``d = n x - sum x``, exact, the quotient is ``sqrt(n) d / sqrt(sum d^2 + n^3 eps)``, eps in units of the
    scale's square. Its magnitude is at most ``sqrt(n)``, since ``d^2`` is one of the terms of the sum.
    """
    axes = list(range(axis, x.numbers.ndim))
    n = math.prod(x.shape[axis] for axis in axes)
    deviations = n * x.numbers - x.numbers.sum(dim=axes, keepdim=True)
    if (2 * n * x.bound).bit_length() > 62:
        raise OverflowError(f"the deviations of {n} numbers of {x.bound.bit_length()} bits do not fit 62 bits")

    # Squares of so few bits that their sum fits, in units that leave the larger of deviations and eps that many.
    m, power = math.frexp(n**3 * epsilon / float(x.scale) ** 2)
    largest = bit_length(deviations.abs().amax(dim=axes, keepdim=True))
    bits = (61 - n.bit_length()) // 2
    unit = largest.clamp(min=(power + 1) // 2 if m else 0) - bits
    least = moved(torch.tensor(round(m * 2**FRACTION)), (2 * unit + FRACTION - power).clamp(max=62))
    variance = moved(deviations, unit).square().sum(dim=axes, keepdim=True) + least
    root, places = reciprocal_root(variance.clamp(min=1))

    finer = largest - FRACTION
    shift = (FRACTION + places + unit - finer - (WIDE - 1)).clamp(0, 62)
    numbers = moved(moved(deviations, finer) * root, shift)
    return Fixed(numbers, torch.tensor(math.sqrt(n) * 2.0 ** (1 - WIDE), dtype=torch.float64), 2**WIDE)


def _by_groups(x: Any, gamma: torch.Tensor, beta: torch.Tensor, groups: int, epsilon: float) -> Fixed:
    x = narrowed(uniform(fixed_point(x)), WIDE)
    parts = normalized(Fixed(x.numbers.unflatten(1, (groups, -1)), x.scale, x.bound), 2, epsilon)
    gamma, beta = (
        along(values.repeat_interleave(x.shape[1] // len(values)), 1, len(x.shape)) for values in (gamma, beta)
    )
    return shifted(uniform(scaled(Fixed(parts.numbers.flatten(1, 2), parts.scale, parts.bound), gamma)), beta)


def _epsilon(attributes: Attributes) -> float:
    return float(attributes.get("epsilon", 1e-5))
