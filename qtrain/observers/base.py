"""The observer's interface: it takes batches of a tensor, merges with its kind, and gives the range to represent."""

from abc import ABC, abstractmethod
from typing import final

import torch
from torch import Tensor

from qtrain.functional.statistics import magnitude_sums, total_magnitude
from qtrain.spec import Granularity, Histogram, Observed


class Observer(ABC):
    """Base of all observers; a subclass is final.

    Every statistic has one row for each of the granularity's G groups. Magnitudes are summed as whole numbers. An
    observer that was fed a stream in two halves and merged equals one that was fed the whole, bit for bit (except the
    moving average, whose definition depends on the order).
    """

    def __init__(self, *, granularity: Granularity) -> None:
        self.granularity = granularity
        self.shape: tuple[int, ...] | None = None
        self.magnitude = torch.zeros(0, dtype=torch.int64)
        self.count = 0
        self._found: dict[int, Observed] = {}

    @final
    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Take one batch ``x`` of the tensor into account."""
        if x.numel() == 0:
            return
        self._found.clear()
        rows = self.granularity.flatten(x.detach())
        if not torch.isfinite(rows).all():
            raise ValueError(
                f"{type(self).__name__}: saw NaN or infinity; check the calibration images and the weights"
            )
        magnitude = magnitude_sums(rows)
        if self.shape is None:
            self.shape = self.granularity.state_shape(tuple(x.shape))
            self.magnitude = torch.zeros_like(magnitude)
        self.magnitude += magnitude
        self.count += rows.shape[1]
        self.accumulate(rows)

    @final
    def merge(self, other: "Observer") -> None:
        """Take into account all that ``other``, an observer of the same kind, has seen."""
        if type(other) is not type(self):
            raise ValueError(
                f"{type(self).__name__}: cannot merge a {type(other).__name__}; merge observers of one kind"
            )
        if other.shape is None:
            return
        self._found.clear()
        if self.shape is None:
            self.shape, self.magnitude = other.shape, torch.zeros_like(other.magnitude)
        self.magnitude += other.magnitude
        self.count += other.count
        self.absorb(other)

    @final
    def observed(self, bits: int) -> Observed:
        """The range to represent with ``bits`` bits, and the mean magnitude, each of the quantizer's state shape."""
        if self.shape is None:
            raise ValueError(f"{type(self).__name__}: nothing was observed; feed at least one non-empty batch")
        # The search for bounds takes longer than looking at the images, and many models may ask for the same bits.
        if bits not in self._found:
            low, high = self.bounds(bits)
            mean = (total_magnitude(self.magnitude) / self.count).float()
            histogram = self.as_histogram()
            if histogram is not None:
                histogram = histogram._replace(counts=histogram.counts.reshape(*self.shape, -1))
            low, high, mean = (found.reshape(self.shape) for found in (low, high, mean))
            self._found[bits] = Observed(low, high, mean, histogram=histogram)
        return self._found[bits]

    @abstractmethod
    def accumulate(self, rows: Tensor) -> None:
        """Update the statistics with ``rows`` (G, n), finite, n > 0."""

    @abstractmethod
    def absorb(self, other: "Observer") -> None:
        """Merge the statistics of ``other``, which is of the same class and has seen something."""

    @abstractmethod
    def bounds(self, bits: int) -> tuple[Tensor, Tensor]:
        """Low and high, each (G,) float32."""

    @abstractmethod
    def as_histogram(self) -> Histogram | None:
        """The histogram of all that was seen, with counts (G, B); ``None`` for an observer that keeps none."""
