"""Straight-through estimators: the only custom gradients of the project live here.

A quantizer's forward is a staircase whose true derivative is zero almost everywhere. Each function below keeps the
exact forward and replaces the derivative by the one that its paper defines.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (factor,) = ctx.saved_tensors
        return grads[0] * factor, None


def round_ste(x: Tensor) -> Tensor:
    """Round to the nearest integer, ties to even; the gradient passes unchanged (Bengio 2013, arXiv 1308.3432)."""
    result: Tensor = _Round.apply(x)
    return result


def scale_gradient(x: Tensor, factor: Tensor) -> Tensor:
    """The identity in the forward, bit for bit; multiplies the gradient by ``factor`` (LSQ, arXiv 1902.08153, §2.2)."""
    result: Tensor = _ScaleGradient.apply(x, factor)
    return result
