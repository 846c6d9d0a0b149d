"""ACIQ's thresholds: the paper's table, a search over the integral of the squared error, samples."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import integrate, optimize, stats
from torch import Tensor

from qtrain.functional.affine import code_range, fake_quantize, symmetric_scale
from qtrain.observers.analytic_error import AnalyticError, best_clipping_threshold
from qtrain.spec import PerTensor

PAPER = {("laplace", 2): 2.83, ("laplace", 3): 3.89, ("laplace", 4): 5.03}
PAPER |= {("gauss", 2): 1.71, ("gauss", 3): 2.15, ("gauss", 4): 2.55}


def gaussian(count: int = 50000) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(0))


def laplacian(count: int = 50000) -> Tensor:
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5
    return (-uniform.sign() * torch.log1p(-2 * uniform.abs())).float()


def bounds(x: Tensor, bits: int, distribution: str = "auto") -> tuple[float, float]:
    observer = AnalyticError(granularity=PerTensor(), distribution=distribution)  # type: ignore[arg-type]
    observer.update(x)
    observed = observer.observed(bits)
    return float(observed.low), float(observed.high)


@pytest.mark.parametrize(("distribution", "bits"), PAPER)
def test_thresholds_match_the_papers_table(distribution: str, bits: int) -> None:
    assert best_clipping_threshold(distribution, bits) == pytest.approx(PAPER[distribution, bits], abs=0.011)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("distribution", ["laplace", "gauss"])
def test_the_threshold_minimizes_the_integral_of_the_squared_error(distribution: str, bits: int) -> None:
    density = (stats.laplace() if distribution == "laplace" else stats.norm()).pdf

    def error(t: float) -> float:
        clipped = 2 * integrate.quad(lambda x: (x - t) ** 2 * density(x), t, t + 40)[0]
        return float(clipped + t**2 / (3 * 4**bits))

    best = optimize.minimize_scalar(error, bounds=(0.2, 20), method="bounded", options={"xatol": 1e-6})
    assert best_clipping_threshold(distribution, bits) == pytest.approx(best.x, rel=1e-3)


@pytest.mark.parametrize("scale", [0.01, 1.0, 300.0])
def test_the_scale_comes_from_the_data(scale: float) -> None:
    low, high = bounds(gaussian() * scale, 4, "gauss")
    assert -low == high == pytest.approx(2.56 * scale, rel=0.01)
    assert bounds(laplacian() * scale, 4, "laplace")[1] == pytest.approx(5.03 * scale, rel=0.015)


def test_auto_recognizes_the_distribution() -> None:
    for x, name in ((gaussian(), "gauss"), (laplacian(), "laplace")):
        assert bounds(x, 3) == bounds(x, 3, name)
    both = AnalyticError(granularity=PerTensor())
    both.update(gaussian())
    b, sigma = both.moments(without_zeros=False)
    assert (float(b), float(sigma)) == pytest.approx((float(gaussian().abs().mean()), 1.0), rel=0.01)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_behind_a_relu_it_is_the_best_for_unsigned_codes(bits: int) -> None:
    """Zeros are left out, and each bit halves a step over [0, T]: near the best of a search on the sample."""
    x = gaussian().relu()
    codes = [torch.tensor(float(code)) for code in code_range(bits, signed=False)]

    def error(high: float) -> float:
        scale = symmetric_scale(torch.tensor(0.0), torch.tensor(high), *codes)
        return float((fake_quantize(x, scale, *codes) - x).square().mean())

    low, high = bounds(x, bits, "gauss")
    assert low == 0.0
    assert high == pytest.approx(best_clipping_threshold("gauss", bits + 1), rel=0.02)
    assert error(high) <= 1.15 * min(error(float(t)) for t in np.linspace(0.5, 4.5, 81))
    assert bounds(torch.cat([x, torch.zeros(10000)]), bits, "gauss") == (low, high)


def test_threshold_never_exceeds_the_observed_range() -> None:
    x = torch.linspace(-1, 1, 1001)
    assert bounds(x, 8, "laplace") == (-1.0, 1.0)
