"""Half a cosine after a linear warm-up."""

import math
from typing import final

from qtrain.schedules.base import Schedule, check_fraction


@final
class Cosine(Schedule):
    """From ``start`` to ``end`` along half a cosine (SGDR without restarts, arXiv 1608.03983, eq. 5).

    During the first ``warmup`` share of the run the value rises in a straight line from ``start * warmup_from``.
    """

    def __init__(self, *, start: float = 1.0, end: float = 0.0, warmup: float = 0.0, warmup_from: float = 0.0) -> None:
        if not 0 <= warmup < 1:
            raise ValueError(f"Cosine: warmup is a share of the run and must be in [0, 1), got {warmup}")
        check_fraction("Cosine", "warmup_from", warmup_from)
        self.start, self.end, self.warmup, self.warmup_from = start, end, warmup, warmup_from

    def __call__(self, progress: float) -> float:
        if progress < self.warmup:
            return self.start * (self.warmup_from + (1 - self.warmup_from) * progress / self.warmup)
        along = min((progress - self.warmup) / (1 - self.warmup), 1.0)
        return self.end + (self.start - self.end) * 0.5 * (1 + math.cos(math.pi * along))
