"""Base of the observers that keep the range of the values and a histogram of them."""

from abc import abstractmethod
from typing import ClassVar, final

import torch
from torch import Tensor

from qtrain.functional.statistics import MANTISSA_BITS, bin_edges
from qtrain.observers.base import Observer
from qtrain.spec import Granularity, Histogram


class HistogramObserver(Observer):
    """Smallest and largest value, ``low`` and ``high`` (G,) float32, and ``histogram`` (G, bins) int64.

    The bins are fixed before any data is seen (:mod:`qtrain.functional.statistics`), so that two observers merge
    exactly. They are those of the float format with ``mantissa_bits``. Subclasses are final.
    """

    mantissa_bits: ClassVar[int] = MANTISSA_BITS

    def __init__(self, *, granularity: Granularity) -> None:
        super().__init__(granularity=granularity)
        self.histogram = torch.zeros(0, dtype=torch.int64)
        self.low, self.high = torch.tensor(float("inf")), torch.tensor(float("-inf"))

    @abstractmethod
    def counted(self, rows: Tensor) -> Tensor:
        """The histogram of ``rows`` (G, n), or of their magnitudes, which is half as long."""

    @final
    def edges(self) -> tuple[Tensor, Tensor]:
        """Lower and upper magnitude of each bin with its sign, both (bins,) float32."""
        near, far = bin_edges(self.histogram.device, self.mantissa_bits)
        bins = self.histogram.shape[1]
        return near[:bins], far[:bins]

    @final
    def as_histogram(self) -> Histogram:
        return Histogram(self.histogram, *self.edges())

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
