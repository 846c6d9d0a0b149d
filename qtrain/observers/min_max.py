"""The whole range: smallest and largest value ever seen."""

from typing import final

import torch
from torch import Tensor

from qtrain.observers.base import Observer
from qtrain.spec import Granularity


@final
class MinMax(Observer):
    """``low = min``, ``high = max`` over all that was seen; merges exactly, since both are associative."""

    def __init__(self, *, granularity: Granularity) -> None:
        super().__init__(granularity=granularity)
        self.low = torch.tensor(float("inf"))
        self.high = torch.tensor(float("-inf"))

    def accumulate(self, rows: Tensor) -> None:
        low, high = rows.float().aminmax(dim=1)
        self.low, self.high = torch.minimum(self.low.to(low), low), torch.maximum(self.high.to(high), high)

    def absorb(self, other: Observer) -> None:
        assert isinstance(other, MinMax)
        self.low = torch.minimum(self.low.to(other.low), other.low)
        self.high = torch.maximum(self.high.to(other.high), other.high)

    def bounds(self, bits: int) -> tuple[Tensor, Tensor]:
        return self.low, self.high

    def as_histogram(self) -> None:
        return None
