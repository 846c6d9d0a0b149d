"""Base of the observers that keep the range of the values and a histogram of them."""

from abc import abstractmethod
from typing import final

import torch
from torch import Tensor

from qtrain.observers.base import Observer
from qtrain.spec import Granularity


class HistogramObserver(Observer):
    """Smallest and largest value, ``low`` and ``high`` (G,) float32, and ``histogram`` (G, bins) int64.

    The bins are fixed before any data is seen (:mod:`qtrain.functional.statistics`), so that two observers merge
    exactly. Subclasses are final.
    """

    def __init__(self, *, granularity: Granularity) -> None:
        super().__init__(granularity=granularity)
        self.histogram = torch.zeros(0, dtype=torch.int64)
        self.low, self.high = torch.tensor(float("inf")), torch.tensor(float("-inf"))

    @abstractmethod
    def counted(self, rows: Tensor) -> Tensor:
        """The histogram of ``rows`` (G, n)."""

    @final
    def accumulate(self, rows: Tensor) -> None:
        low, high = rows.float().aminmax(dim=1)
        self._add(self.counted(rows), low, high)

    @final
    def absorb(self, other: Observer) -> None:
        assert isinstance(other, HistogramObserver)
        self._add(other.histogram, other.low, other.high)

    def _add(self, histogram: Tensor, low: Tensor, high: Tensor) -> None:
        self.histogram = histogram if self.histogram.numel() == 0 else self.histogram + histogram
        self.low, self.high = torch.minimum(self.low.to(low), low), torch.maximum(self.high.to(high), high)
