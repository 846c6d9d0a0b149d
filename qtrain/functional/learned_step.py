"""What methods with a learned step share (LSQ, LSQ+)."""

import torch
from torch import Tensor

SMALLEST_SCALE = 2.0**-40
"""Keeps the division defined when an optimizer drives a scale or a clipping level to zero."""


def step_gradient_factor(x: Tensor, groups: int, high: Tensor, *, is_weight: bool) -> Tensor:
    """``1 / sqrt(N Qp)``, 0-dim: the factor of a step's gradient in LSQ (Esser 2020, arXiv 1902.08153, §2.2).

    N is the number of elements that share a step: for a weight the elements of one of its ``groups``, for an activation
    the elements of one sample. ``high`` is Qp, 0-dim.
    """
    shared = x.numel() // max(groups, 1) if is_weight else x.shape[1:].numel()
    return torch.rsqrt(max(shared, 1) * high)
