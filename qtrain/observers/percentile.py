"""The range without its tails."""

from typing import final

import torch
from torch import Tensor

from qtrain.functional.statistics import FINE_MANTISSA_BITS, float_histogram
from qtrain.observers.histogram import HistogramObserver
from qtrain.spec import Granularity
from qtrain.utils.checks import check_range


def histogram_quantile(counts: Tensor, near: Tensor, far: Tensor, share: float) -> Tensor:
    """The value below which ``share`` of the counted values lie: counts (G, B) in ascending bins -> (G,) float32.

    Values are taken as spread evenly over their bin, from ``near`` to ``far`` (B,).
    """
    reached = counts.cumsum(dim=1).double()
    wanted = share * reached[:, -1:]
    place = torch.searchsorted(reached, wanted).clamp(max=counts.shape[1] - 1)
    inside = counts.gather(1, place).double()
    before = reached.gather(1, place) - inside
    part = ((wanted - before) / inside.clamp(min=1)).clamp(0, 1)[:, 0]
    low, high = near[place[:, 0]].double(), far[place[:, 0]].double()
    return (low + (high - low) * part).float()


@final
class Percentile(HistogramObserver):
    """``percentile`` % of the values lie between ``low`` and ``high``, and as many below as above.

    Two-sided percentile (Wu et al. 2020, "Integer quantization", arXiv 2004.09602, §3.2, has that of magnitudes). Read
    from a histogram with bins of a relative width of 1/256 and interpolated inside, so that it merges exactly; never
    beyond the values seen.
    """

    mantissa_bits = FINE_MANTISSA_BITS

    def __init__(self, *, granularity: Granularity, percentile: float = 99.9) -> None:
        check_range("Percentile", "(0, 100]", percentile=percentile)
        super().__init__(granularity=granularity)
        self.percentile = percentile

    def counted(self, rows: Tensor) -> Tensor:
        return float_histogram(rows, self.mantissa_bits)

    def bounds(self, bits: int) -> tuple[Tensor, Tensor]:
        near, far = self.edges()
        half = len(near) // 2
        # What is below 2^-32 counts as zero, so that a ReLU's zeros are not spread over a bin.
        far[0] = far[half] = 0.0
        # Ascending from the most negative value: there a bin begins at its far edge.
        counts = torch.cat([self.histogram[:, half:].flip(1), self.histogram[:, :half]], dim=1)
        begin, end = torch.cat([far[half:].flip(0), near[:half]]), torch.cat([near[half:].flip(0), far[:half]])
        tail = (1 - self.percentile / 100) / 2
        low, high = (histogram_quantile(counts, begin, end, share) for share in (tail, 1 - tail))
        return low.clamp(self.low, self.high), high.clamp(self.low, self.high)
