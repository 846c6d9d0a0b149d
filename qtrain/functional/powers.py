"""Powers of two by bit patterns: exact, and without a logarithm that could be off by one."""

import torch
from torch import Tensor

_EXPONENT = 0x7F800000


def power_below(x: Tensor) -> Tensor:
    """``2^floor(log2 x)`` for ``x >= 0``, float32, its sign ignored: shape of ``x``; 0 for zero and subnormals.

    Infinite for infinity and NaN.
    """
    return (x.view(torch.int32) & _EXPONENT).view(torch.float32)
