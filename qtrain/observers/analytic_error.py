"""The clipping threshold of least squared error, from a formula for the distribution instead of a search (ACIQ)."""

import math
from collections.abc import Callable
from typing import Literal, final

import torch
from torch import Tensor

from qtrain.functional.statistics import FINE_MANTISSA_BITS, float_histogram
from qtrain.observers.histogram import HistogramObserver
from qtrain.spec import Granularity


def _beyond_laplace(t: float) -> float:
    return math.exp(-t)


def _beyond_gauss(t: float) -> float:
    density = math.exp(-(t**2) / 2) / math.sqrt(2 * math.pi)
    return 2 * (density - t * math.erfc(t / math.sqrt(2)) / 2)


BEYOND: dict[str, Callable[[float], float]] = {"laplace": _beyond_laplace, "gauss": _beyond_gauss}
"""``E[(|x| - t)+]``, by which a threshold ``t`` clips on average, at scale 1 (b of Laplace, sigma of Gauss)."""


def best_clipping_threshold(distribution: str, bits: int) -> float:
    """The threshold of least squared error for ``2^bits`` levels over ``[-t, t]``, in units of b or sigma.

    Banner et al. 2019, arXiv 1810.05723, §3: rounding costs ``t^2 / (3 4^bits)``, clipping ``E[((|x| - t)+)^2]``,
    and where the sum's derivative vanishes, ``t / (3 4^bits) = E[(|x| - t)+]``. The right side falls and the left
    rises, so that halving an interval finds the one solution.
    """
    below, above = 0.0, 64.0
    for _ in range(80):
        middle = (below + above) / 2
        if middle / (3 * 4.0**bits) < BEYOND[distribution](middle):
            below = middle
        else:
            above = middle
    return (below + above) / 2


@final
class AnalyticError(HistogramObserver):
    """``|x| <= T`` with ``T`` the threshold of least squared error for Laplace's or Gauss's distribution (ACIQ).

    ``distribution`` is ``laplace``, ``T = best b``, ``b = mean|x|``; ``gauss``, ``T = best sigma``, ``sigma^2 = mean
    x^2``; or ``auto``, for each group the one whose ratio ``mean|x| / sigma``, 0.707 and 0.798, is nearer. Values are
    taken as centered at zero. Where nothing negative was seen they are taken as the positive half of such values, zeros
    left out, and unsigned codes have twice the levels there. Moments are those of a histogram with bins of a relative
    width of 1/256, so that two observers merge exactly.
    """

    mantissa_bits = FINE_MANTISSA_BITS

    def __init__(self, *, granularity: Granularity, distribution: Literal["laplace", "gauss", "auto"] = "auto") -> None:
        if distribution not in (*BEYOND, "auto"):
            raise ValueError(f"AnalyticError: distribution must be one of {[*BEYOND, 'auto']}, got {distribution!r}")
        super().__init__(granularity=granularity)
        self.distribution = distribution

    def counted(self, rows: Tensor) -> Tensor:
        return float_histogram(rows.abs(), self.mantissa_bits).chunk(2, dim=1)[0]

    def moments(self, *, without_zeros: bool) -> tuple[Tensor, Tensor]:
        """``mean|x|`` and the square root of ``mean x^2``, (G,) float64; 0 where there are no values."""
        near, far = (edge.double() for edge in self.edges())
        counts = self.histogram.double()
        # The first bin holds zeros and magnitudes below 2^-32.
        counts[:, 0] = 0
        number = counts.sum(dim=1) + (0 if without_zeros else self.histogram[:, 0])
        number = number.clamp(min=1)
        first = (counts * (near + far) / 2).sum(dim=1) / number
        second = (counts * (near.square() + near * far + far.square()) / 3).sum(dim=1) / number
        return first, second.sqrt()

    def bounds(self, bits: int) -> tuple[Tensor, Tensor]:
        signed = bool((self.low < 0).any())
        b, sigma = self.moments(without_zeros=not signed)
        laplace, gauss = (best_clipping_threshold(name, bits if signed else bits + 1) for name in ("laplace", "gauss"))
        between = (math.sqrt(1 / 2) + math.sqrt(2 / math.pi)) / 2
        is_gauss = b > between * sigma if self.distribution == "auto" else torch.tensor(self.distribution == "gauss")
        threshold = torch.where(is_gauss.to(b.device), gauss * sigma, laplace * b).float()
        # If all values are below 2^-32, the moments say nothing, and the whole range is taken.
        threshold = torch.where(b > 0, threshold, math.inf)
        return (-threshold).clamp(self.low, self.high), threshold.clamp(self.low, self.high)
