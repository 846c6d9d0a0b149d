"""The range that loses least: rounding error inside against clipping error outside (OMSE)."""

from typing import final

import torch
from torch import Tensor

from qtrain.functional.affine import asymmetric_scale, code_range, symmetric_scale
from qtrain.functional.clamping import clamped
from qtrain.functional.statistics import float_histogram
from qtrain.observers.histogram import HistogramObserver
from qtrain.spec import Granularity
from qtrain.utils.checks import check_range

AT_ONCE = 2**17
"""Numbers, groups times bins times candidates, that errors are computed of at a time: small operations cost as much as
large ones, and what fits a processor's cache costs least."""


@final
class SquaredError(HistogramObserver):
    """Least mean squared error over ``candidates`` equal shrinkings of the observed range (arXiv 1902.06822).

    The error is computed from a histogram whose bins are those of the float format
    (:func:`qtrain.functional.statistics.float_histogram`), so it merges exactly and needs no second pass over the data.
    A bin may be several steps wide, hence its error is the mean over the bin and not that of its center.
    ``symmetric`` says what the quantizer does: codes about zero (unsigned where nothing negative was seen), or a zero
    point. Conversion sets it for a quantizer whose codes are shifted.
    """

    def __init__(self, *, granularity: Granularity, symmetric: bool = True, candidates: int = 128) -> None:
        check_range("SquaredError", "[2, inf)", candidates=candidates)
        super().__init__(granularity=granularity)
        self.symmetric = symmetric
        self.candidates = candidates

    def counted(self, rows: Tensor) -> Tensor:
        return float_histogram(rows)

    def bounds(self, bits: int) -> tuple[Tensor, Tensor]:
        signed = bool((self.low < 0).any()) and self.symmetric
        code_low, code_high = (self.low.new_tensor(float(c)) for c in code_range(bits, signed=signed))
        used = self.histogram.any(dim=0)
        counts = self.histogram[:, used].to(torch.float32)
        near, far = (edge[used].expand_as(counts) for edge in self.edges())
        fractions = torch.arange(1, self.candidates + 1, device=counts.device) / self.candidates
        errors = []
        for some in fractions.split(max(1, AT_ONCE // max(1, counts.numel()))):
            low, high = self.low * some[:, None], self.high * some[:, None]
            if self.symmetric:
                scale, zero = symmetric_scale(low, high, code_low, code_high), torch.zeros_like(low)
            else:
                scale, zero = asymmetric_scale(low, high, code_low, code_high)
            scale, zero = scale.unsqueeze(-1), zero.unsqueeze(-1)
            lost = [_integral(edge / scale, code_low - zero, code_high - zero) for edge in (near, far)]
            errors.append((counts * (lost[1] - lost[0]) / (far - near) * scale**3).sum(dim=-1))
        least, first = torch.cat(errors).nan_to_num(nan=torch.inf, posinf=torch.inf).min(dim=0)
        fraction = torch.where(least.isinf(), 1.0, fractions[first])
        return self.low * fraction, self.high * fraction


def _integral(u: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """``int_0^u (v - round(clamp(v, low, high)))^2 dv`` for whole ``low <= 0 <= high``, in steps cubed.

    Each whole step contributes 1/12, what lies beyond the nearest code the third of its cube.
    """
    nearest = clamped(u, low, high).round()
    return nearest / 12 + (u - nearest) ** 3 / 3
