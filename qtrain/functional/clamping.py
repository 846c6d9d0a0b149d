"""Clamping to bounds that are tensors, as a quantizer's are, so that a change of bits compiles nothing anew.

torch's own ``clamp`` is slow with tensors in eager mode.
"""

import torch
from torch import Tensor


def clamped(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """What ``x.clamp(low, high)`` gives, for bounds that broadcast against ``x``; without its gradient at ties."""
    above = torch.maximum(x, low)
    return torch.minimum(above, high) if _needs_copies(above, high) else torch.minimum(above, high, out=above)


def clamp_(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """:func:`clamped`, which may overwrite ``x``; use what it returns."""
    if _needs_copies(x, low, high):
        return clamped(x, low, high)
    return torch.minimum(torch.maximum(x, low, out=x), high, out=x)


def _needs_copies(*tensors: Tensor) -> bool:
    """Compiled code has no places to overwrite, and autograd refuses them."""
    return torch.compiler.is_compiling() or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
