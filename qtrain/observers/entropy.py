"""The clipping threshold that changes the distribution of magnitudes least (TensorRT's calibration)."""

from typing import final

import torch
from torch import Tensor

from qtrain.functional.statistics import float_histogram
from qtrain.observers.histogram import HistogramObserver
from qtrain.spec import Granularity

THRESHOLD_BINS = 2048
THRESHOLD_MANTISSA_BITS = 11
"""Bins of the float format as fine as a 2048th of the largest value."""


LEAST_KEPT = 0.5
"""Share of the magnitudes that a threshold leaves as they are, at least. The smallest of few values may lie in one bin,
from which ``P`` and ``Q`` do not differ."""


def kl_divergence(counts: Tensor, kept: Tensor, levels: int) -> Tensor:
    """``KL(P || Q)`` for each clipping of a histogram: counts (B,) float64, ``kept`` (C,) bins -> (C,) float64.

    ``P`` are the first ``kept`` bins, with all beyond added to the last of them. ``Q`` are the same bins without that,
    merged into ``levels`` equal levels, whose counts are spread evenly over those of their bins that hold something.
    Infinite where ``P`` has something and ``Q`` nothing.
    """
    place = torch.arange(len(counts), device=counts.device)
    inside = place < kept[:, None]
    p = counts * inside
    q_counts, held = p.clone(), (p > 0).double()
    p = p + (counts.sum() - p.sum(dim=1, keepdim=True)) * (place == kept[:, None] - 1)
    level = (place * levels).div(kept[:, None], rounding_mode="floor").clamp(max=levels - 1)
    empty = counts.new_zeros(len(kept), levels)
    each = empty.scatter_add(1, level, q_counts) / empty.scatter_add(1, level, held).clamp(min=1)
    q = each.gather(1, level) * held
    p, q = p / p.sum(dim=1, keepdim=True), q / q.sum(dim=1, keepdim=True).clamp(min=torch.finfo(q.dtype).tiny)
    return torch.where(p > 0, p * (p / q).log(), 0.0).sum(dim=1)


@final
class Entropy(HistogramObserver):
    """``|x| <= T`` with the ``T`` whose clipping and rounding change the distribution of ``|x|`` least.

    Migacz 2017, "8-bit inference with TensorRT". The magnitudes are counted in 2048 equal bins up to the largest. Every
    end of a bin is a candidate; the one with the least :func:`kl_divergence` is taken. There are as many levels as a
    quantizer has magnitudes: ``2^(bits-1)``, or ``2^bits`` where nothing negative was seen. Values of exactly zero
    (below 2^-32), which no threshold changes, do not count. ``stride`` is the distance of the thresholds tried, in
    bins; the original's is 1. At least half of the values are left as they are, which the original has no need to ask.

    Counts are kept in bins of the float format and put into the 2048 at the end, each with its center, so that two
    observers merge exactly.
    """

    mantissa_bits = THRESHOLD_MANTISSA_BITS

    def __init__(self, *, granularity: Granularity, stride: int = 8) -> None:
        if not 1 <= stride <= THRESHOLD_BINS:
            raise ValueError(f"Entropy: stride must be in 1..{THRESHOLD_BINS}, got {stride}")
        super().__init__(granularity=granularity)
        self.stride = stride

    def counted(self, rows: Tensor) -> Tensor:
        # Magnitudes are not negative, so they lie in the first half of the bins.
        return float_histogram(rows.abs(), self.mantissa_bits).chunk(2, dim=1)[0]

    def bounds(self, bits: int) -> tuple[Tensor, Tensor]:
        largest = torch.maximum(self.low.abs(), self.high.abs())
        levels = 2 ** (bits - 1) if bool((self.low < 0).any()) else 2**bits
        if levels < THRESHOLD_BINS:
            kept = torch.arange(THRESHOLD_BINS, levels - 1, -self.stride, device=largest.device)
            shares = [self._best(row, top, kept, levels) for row, top in zip(self.histogram, largest, strict=True)]
            largest = largest * torch.stack(shares)
        return (-largest).clamp(self.low, self.high), largest.clamp(self.low, self.high)

    def _best(self, row: Tensor, top: Tensor, kept: Tensor, levels: int) -> Tensor:
        """The best threshold as a share of ``top``, the largest magnitude in ``row``; the higher one at a tie."""
        near, far = (edge.double() for edge in self.edges())
        place = (
            ((near + far) / 2 / top.double() * THRESHOLD_BINS)
            .clamp(max=THRESHOLD_BINS - 1)
            .nan_to_num(0.0)
            .to(torch.int64)
        )
        counts = torch.zeros(THRESHOLD_BINS, dtype=torch.float64, device=row.device)
        counts = counts.scatter_add(0, place[1:], row[1:].double())
        if not bool(counts.any()):
            return torch.ones_like(top)
        kept = kept[counts.cumsum(0)[kept - 1] >= LEAST_KEPT * counts.sum()]
        return (kept[kl_divergence(counts, kept, levels).argmin()] / THRESHOLD_BINS).to(top)
