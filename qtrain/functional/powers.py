"""Powers of two by bit patterns: exact, and without a logarithm that could be off by one."""

import torch
from torch import Tensor

from qtrain.functional.indicator import above, equal

_EXPONENT = {torch.float32: (torch.int32, 0x7F800000), torch.float64: (torch.int64, 0x7FF0000000000000)}
"""Type of a number -> the type of integers of its size, and where in these its exponent is."""


def power_below(x: Tensor) -> Tensor:
    """``2^floor(log2 x)`` for ``x >= 0``, its sign ignored: shape and dtype of ``x``; 0 for zero and subnormals.

    ``x`` is float32 or float64. Infinite for infinity and NaN.
    """
    integers, exponent = _EXPONENT[x.dtype]
    return (x.view(integers) & exponent).view(x.dtype)


def nearest_power(t: Tensor, least: Tensor) -> Tensor:
    """The nearest of 0 and ``+-2^k >= least``, the lower one at a tie: shape and dtype of ``t``, no gradient.

    ``least`` (0-dim) is a power of two. The middle of two neighbors is 1.5 times the smaller one: no table.
    """
    size, negative = t.detach().abs(), above(-t, 0.0)

    def beyond(middle: Tensor) -> Tensor:
        return above(size, middle) + negative * equal(size, middle)  # the lower of two negative ones is the larger

    below = power_below(size)
    nearest = torch.maximum(below * (1 + beyond(1.5 * below)), least)
    return t.detach().sign() * nearest * beyond(least / 2)
