"""Levels that each group has for itself: which one is nearest to a value, and sums over the values of each level.

``levels`` are (L, *state) float32, ascending in each group; ``x`` is any tensor that the granularity takes. Halfway
between two levels the lower one is nearest.
"""

import torch
from torch import Tensor

from qtrain.functional.levels import bucket
from qtrain.spec import Granularity, PerTensor
from qtrain.storage.codebook import look_up


def nearest_rank(x: Tensor, levels: Tensor, granularity: Granularity) -> Tensor:
    """The number of the level nearest to each of ``x``: int64, shape of ``x``."""
    if levels.ndim == 1:
        return bucket(x, (levels[:-1] + levels[1:]) / 2)
    rank = torch.zeros_like(x, dtype=torch.int64)
    for threshold in _thresholds(x, levels, granularity):
        rank = rank + (x > threshold)
    return rank


def nearest_value(x: Tensor, levels: Tensor, granularity: Granularity) -> Tensor:
    """The level nearest to each of ``x``: float32, shape of ``x``.

    Compiled code looks up one value at a time, on a CPU. There the levels are gone through on whole vectors.
    """
    if not torch.compiler.is_compiling():
        return look_up(nearest_rank(x, levels, granularity), levels.movedim(0, -1).contiguous(), granularity)
    value = granularity.expand(levels[0], tuple(x.shape)).expand(x.shape)
    for threshold, level in zip(_thresholds(x, levels, granularity), levels[1:], strict=True):
        value = torch.where(x > threshold, granularity.expand(level, tuple(x.shape)), value)
    return value


def sums_by_level(x: Tensor, of: Tensor, levels: Tensor, granularity: Granularity) -> tuple[Tensor, Tensor]:
    """How many of ``x`` each level is nearest to, and the sum of ``of`` there: (L, G) float32 each.

    ``of`` has the shape of ``x``. What lies above each threshold is summed, and differences give the levels. So no
    place is looked up, and the order of additions is fixed, also on a GPU.
    """
    if isinstance(granularity, PerTensor):  # mostly large: compiled code goes through it once, for all thresholds
        pairs = []
        for threshold in _thresholds(x, levels, granularity):
            above = torch.where(x > threshold, 1.0, 0.0)
            pairs.append((above.sum(), (above * of).sum()))
        counts, sums = (torch.stack(found)[:, None] for found in zip(*pairs, strict=True))
        all_counts, all_sums = x.new_full((1, 1), float(x.numel())), of.sum().reshape(1, 1)
    else:
        rows, of_rows = granularity.flatten(x), granularity.flatten(of)
        middle = (levels[:-1] + levels[1:]) / 2
        above = torch.where(rows > middle.reshape(len(middle), len(rows), 1), 1.0, 0.0)
        counts, sums = above.sum(dim=2), (above * of_rows).sum(dim=2)
        all_counts, all_sums = x.new_full((1, len(rows)), float(rows.shape[1])), of_rows.sum(dim=1)[None]
    counts, sums, none = torch.cat([all_counts, counts]), torch.cat([all_sums, sums]), torch.zeros_like(all_sums)
    return counts - torch.cat([counts[1:], none]), sums - torch.cat([sums[1:], none])


def _thresholds(x: Tensor, levels: Tensor, granularity: Granularity) -> list[Tensor]:
    """Halfway between neighboring levels, each as it broadcasts against ``x``."""
    return [granularity.expand(middle, tuple(x.shape)) for middle in ((levels[:-1] + levels[1:]) / 2).unbind()]
