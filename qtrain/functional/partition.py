"""Which part of a weight is set for good first: the largest, or any."""

from __future__ import annotations

import torch
from torch import Tensor


def largest_first(rank_by: Tensor, already: Tensor, count: int) -> Tensor:
    """``already`` (bool) and the largest of the rest by ``rank_by``, ``count`` in all: bool, shape of ``rank_by``.

    Where more than ``count`` are in already, those. Ties go to the earlier element. No value is waited for.
    """
    order = torch.where(already, torch.inf, rank_by.float()).reshape(-1).argsort(descending=True, stable=True)
    chosen = torch.zeros_like(order, dtype=torch.bool)
    chosen[order[:count]] = True
    return chosen.reshape(already.shape) | already
