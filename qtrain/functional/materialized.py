"""A tensor that compiled code writes to memory before it reads it."""

import torch
from torch import Tensor


@torch.library.custom_op("qtrain::copied", mutates_args=())
def _copied(x: Tensor) -> Tensor:
    return x.clone()


@_copied.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def materialized(x: Tensor) -> Tensor:
    """``x``, without a gradient. A compiler for the CPU computes it once, and not again in each loop that reads it.

    It mostly does so by itself, but not where it counts only what a loop reads: neighbors in turns, it then gathers one
    by one all that ``x`` is computed from. Elsewhere this changes nothing.
    """
    x = x.detach()
    return _copied(x) if torch.compiler.is_compiling() and x.device.type == "cpu" else x
