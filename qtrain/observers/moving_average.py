"""A smoothed range: single outlying batches count little."""

from typing import final

import torch
from torch import Tensor

from qtrain.observers.base import Observer
from qtrain.spec import Granularity


@final
class MovingAverage(Observer):
    """Exponential moving average of each batch's minimum and maximum (Jacob 2018, arXiv 1712.05877, §3.1).

    ``low <- m low + (1 - m) min(batch)``, likewise ``high``; the first batch sets both. Two observers merge by the
    mean of their averages weighted with the batches that each saw, which is symmetric but, unlike the other observers'
    merge, not what one observer of the whole stream would hold.
    """

    def __init__(self, *, granularity: Granularity, momentum: float = 0.9) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"MovingAverage: momentum must be in [0, 1), got {momentum}")
        super().__init__(granularity=granularity)
        self.momentum = momentum
        self.low = torch.zeros(0)
        self.high = torch.zeros(0)
        self.batches = 0

    def accumulate(self, rows: Tensor) -> None:
        low, high = rows.float().aminmax(dim=1)
        if self.batches == 0:
            self.low, self.high = low, high
        else:
            self.low = torch.lerp(low, self.low, self.momentum)
            self.high = torch.lerp(high, self.high, self.momentum)
        self.batches += 1

    def absorb(self, other: Observer) -> None:
        assert isinstance(other, MovingAverage)
        if self.batches == 0:
            self.low, self.high = other.low, other.high
        else:
            share = other.batches / (self.batches + other.batches)
            self.low = torch.lerp(self.low, other.low, share)
            self.high = torch.lerp(self.high, other.high, share)
        self.batches += other.batches

    def bounds(self, bits: int) -> tuple[Tensor, Tensor]:
        return self.low, self.high

    def as_histogram(self) -> None:
        return None
