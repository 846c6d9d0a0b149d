"""The range that loses least: rounding error inside against clipping error outside (OMSE)."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from qtrain.functional.affine import asymmetric_scale, code_range, symmetric_scale
from qtrain.functional.statistics import BINS, bin_edges, float_histogram
from qtrain.observers.base import Observer
from qtrain.spec import Granularity


@final
class SquaredError(Observer):
    """Least mean squared error over ``candidates`` equal shrinkings of the observed range (arXiv 1902.06822).

    The error is computed from a histogram whose bins are those of the float format
    (:func:`qtrain.functional.statistics.float_histogram`), so it merges exactly and needs no second pass over the data.
    A bin may be several steps wide, hence its error is the mean over the bin and not that of its center.
    ``symmetric`` must say what the quantizer does: codes about zero (unsigned where nothing negative was seen), or a
    zero point.
    """

    def __init__(self, *, granularity: Granularity, symmetric: bool = True, candidates: int = 128) -> None:
        if candidates < 2:
            raise ValueError(f"SquaredError: candidates must be at least 2, got {candidates}")
        super().__init__(granularity=granularity)
        self.symmetric = symmetric
        self.candidates = candidates
        self.histogram = torch.zeros(0, BINS, dtype=torch.int64)
        self.low = torch.tensor(float("inf"))
        self.high = torch.tensor(float("-inf"))

    def accumulate(self, rows: Tensor) -> None:
        low, high = rows.float().aminmax(dim=1)
        self._add(float_histogram(rows), low, high)

    def absorb(self, other: Observer) -> None:
        assert isinstance(other, SquaredError)
        self._add(other.histogram, other.low, other.high)

    def bounds(self, bits: int) -> tuple[Tensor, Tensor]:
        signed = bool((self.low < 0).any()) and self.symmetric
        code_low, code_high = (self.low.new_tensor(float(c)) for c in code_range(bits, signed=signed))
        used = self.histogram.any(dim=0)
        counts = self.histogram[:, used].to(torch.float32)
        near, far = (edge[used].expand_as(counts) for edge in bin_edges(counts.device))
        best = torch.full_like(self.low, float("inf"))
        best_fraction = torch.ones_like(self.low)
        for i in range(1, self.candidates + 1):
            fraction = i / self.candidates
            low, high = self.low * fraction, self.high * fraction
            if self.symmetric:
                scale, zero = symmetric_scale(low, high, code_low, code_high), torch.zeros_like(low)
            else:
                scale, zero = asymmetric_scale(low, high, code_low, code_high)
            scale, zero = scale.unsqueeze(1), zero.unsqueeze(1)
            lost = [_integral(edge / scale, code_low - zero, code_high - zero) for edge in (near, far)]
            error = (counts * (lost[1] - lost[0]) / (far - near) * scale**3).sum(dim=1)
            best_fraction = torch.where(error < best, fraction, best_fraction)
            best = torch.minimum(best, error)
        return self.low * best_fraction, self.high * best_fraction

    def _add(self, histogram: Tensor, low: Tensor, high: Tensor) -> None:
        self.histogram = histogram if self.histogram.numel() == 0 else self.histogram + histogram
        self.low = torch.minimum(self.low.to(low), low)
        self.high = torch.maximum(self.high.to(high), high)


def _integral(u: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """``int_0^u (v - round(clamp(v, low, high)))^2 dv`` for whole ``low <= 0 <= high``, in steps cubed.

    Each whole step contributes 1/12, what lies beyond the nearest code the third of its cube.
    """
    nearest = u.clamp(low, high).round()
    return nearest / 12 + (u - nearest) ** 3 / 3
