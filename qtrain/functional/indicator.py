"""Comparisons as numbers, 1 or 0, and the sign of a binary code.

In compiled code they are arithmetic alone. A compiler keeps the booleans of a comparison for the backward, or from one
loop to the next, and on a CPU it stores booleans one by one, which takes longer than all else that a quantizer does.
"""

import torch
from torch import Tensor


def above(x: Tensor, bound: Tensor | float) -> Tensor:
    """1 where ``x > bound``, which broadcasts, else 0; dtype of ``x``, finite numbers, no gradient."""
    x = x.detach()
    if torch.compiler.is_compiling():
        return (x - bound).detach().sign().clamp(min=0)
    return (x > bound).to(x.dtype)


def equal(x: Tensor, other: Tensor | float) -> Tensor:
    """1 where ``x`` equals ``other``, which broadcasts, else 0; dtype of ``x``, finite numbers, no gradient."""
    x = x.detach()
    if torch.compiler.is_compiling():
        return 1 - (x - other).detach().abs().sign()
    return (x == other).to(x.dtype)


def sign(x: Tensor) -> Tensor:
    """-1 or 1, and 1 at zero; float32, no gradient."""
    if torch.compiler.is_compiling():
        return 1 - 2 * above(-x.float(), 0.0)
    return torch.where(x >= 0, 1.0, -1.0)
