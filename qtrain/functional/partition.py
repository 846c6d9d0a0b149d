"""Which part of a weight is frozen first: the largest elements, or random ones."""

import torch
from torch import Tensor


def largest_first(rank_by: Tensor, already: Tensor, count: int) -> Tensor:
    """``already`` (bool) and the largest of the rest by ``rank_by``, ``count`` in all: bool, shape of ``rank_by``.

    If ``already`` holds more than ``count`` elements, the result is ``already``. Ties go to the earlier element. The
    host never waits for a value of the device.
    """
    order = torch.where(already, torch.inf, rank_by.float()).reshape(-1).argsort(descending=True, stable=True)
    chosen = torch.zeros_like(order, dtype=torch.bool)
    chosen[order[:count]] = True
    return chosen.reshape(already.shape) | already
