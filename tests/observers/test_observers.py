"""Observers: exact ranges, merging, and the least squared error against a search on the data themselves."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qtrain.functional.affine import asymmetric_scale, code_range, fake_quantize, symmetric_scale
from qtrain.observers.analytic_error import AnalyticError
from qtrain.observers.base import Observer
from qtrain.observers.entropy import Entropy
from qtrain.observers.min_max import MinMax
from qtrain.observers.moving_average import MovingAverage
from qtrain.observers.percentile import Percentile
from qtrain.observers.squared_error import SquaredError
from qtrain.spec import Granularity, PerChannel, PerTensor

Make = Callable[..., Observer]
MERGING: list[Make] = [
    MinMax,
    SquaredError,
    partial(SquaredError, symmetric=False),
    partial(Percentile, percentile=90.0),
    Entropy,
    AnalyticError,
]
ALL: list[Make] = [*MERGING, MovingAverage]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fed(make: Make, granularity: Granularity, *batches: Tensor) -> Observer:
    observer = make(granularity=granularity)
    for batch in batches:
        observer.update(batch)
    return observer


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(1)])
@pytest.mark.parametrize("make", MERGING)
@settings(max_examples=15)
@given(st.integers(0, 100), st.integers(1, 5))
def test_two_halves_merge_to_the_whole(make: Make, granularity: Granularity, seed: int, cut: int) -> None:
    x = noise(6, 3, 4, seed=seed) * torch.exp(5 * noise(6, 3, 4, seed=seed + 1000))
    whole = fed(make, granularity, x)
    merged = fed(make, granularity, x[:cut])
    merged.merge(fed(make, granularity, x[cut:]))
    assert torch.equal(merged.magnitude, whole.magnitude), "whole numbers: no order in which they are summed shows"
    for got, expected in zip(merged.observed(4)[:3], whole.observed(4)[:3], strict=True):
        assert got.shape == expected.shape
        assert torch.equal(got, expected)


@pytest.mark.parametrize("make", ALL)
def test_merging_with_an_empty_observer_changes_nothing(make: Make) -> None:
    x = noise(10)
    seen, empty = fed(make, PerTensor(), x), fed(make, PerTensor())
    before = seen.observed(4)
    seen.merge(empty)
    empty.merge(seen)
    for got, again, expected in zip(seen.observed(4)[:3], empty.observed(4)[:3], before[:3], strict=True):
        assert torch.equal(got, expected)
        assert torch.equal(again, expected)


@pytest.mark.parametrize("make", ALL)
def test_merging_does_not_change_the_other(make: Make) -> None:
    other, mine = fed(make, PerTensor(), noise(10)), fed(make, PerTensor())
    before = other.observed(4)
    mine.merge(other)
    mine.update(noise(10, seed=1) * 100)
    for got, expected in zip(other.observed(4)[:3], before[:3], strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_min_max_is_the_range(dtype: torch.dtype) -> None:
    x = noise(4, 3, 2).to(dtype)
    observed = fed(MinMax, PerChannel(0), x[:, :1], x[:, 1:]).observed(8)
    assert torch.equal(observed.low, x.float().amin((1, 2), keepdim=True))
    assert torch.equal(observed.high, x.float().amax((1, 2), keepdim=True))
    torch.testing.assert_close(observed.mean_abs, x.float().abs().mean((1, 2), keepdim=True))
    assert observed.low.dtype == torch.float32


def test_moving_average_is_its_recurrence() -> None:
    batches = [noise(20, seed=i) for i in range(4)]
    low, high = batches[0].min().item(), batches[0].max().item()
    for batch in batches[1:]:
        low, high = 0.9 * low + 0.1 * batch.min().item(), 0.9 * high + 0.1 * batch.max().item()
    observed = fed(MovingAverage, PerTensor(), *batches).observed(8)
    torch.testing.assert_close(observed.low, torch.tensor(low))
    torch.testing.assert_close(observed.high, torch.tensor(high))


def test_moving_averages_merge_by_the_batches_that_each_saw() -> None:
    one, two = (
        fed(MovingAverage, PerTensor(), *[torch.ones(3)] * 3),
        fed(MovingAverage, PerTensor(), torch.full((3,), 5.0)),
    )
    one.merge(two)
    assert one.observed(8).high == pytest.approx(2.0)  # (3 * 1 + 1 * 5) / 4


def error(x: Tensor, low: Tensor, high: Tensor, bits: int, *, symmetric: bool) -> float:
    """Mean squared error on the data themselves of quantizing ``x`` with codes that span [low, high]."""
    codes = [torch.tensor(float(c)) for c in code_range(bits, signed=symmetric and bool((x < 0).any()))]
    if symmetric:
        return (fake_quantize(x, symmetric_scale(low, high, *codes), *codes) - x).square().mean().item()
    scale, zero_point = asymmetric_scale(low, high, *codes)
    return (fake_quantize(x, scale, *codes, zero_point) - x).square().mean().item()


DISTRIBUTIONS = {
    "normal": noise(4000),
    "relu": noise(4000).relu(),
    "laplace": noise(4000).sign() * noise(4000, seed=1).abs().square(),
    "outlier": torch.cat([noise(4000), torch.tensor([30.0])]),
    "shifted": noise(4000) * 0.2 + 0.5,
    "uniform": torch.linspace(-1, 1, 4001),
}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_squared_error_is_that_of_a_search_on_the_data(name: str, bits: int, symmetric: bool) -> None:
    """Within 2 % of the best candidate; 8 % at 8 bits, where a bin is several steps wide and the sample finite."""
    x = DISTRIBUTIONS[name]
    observed = fed(partial(SquaredError, symmetric=symmetric), PerTensor(), *x.split(1000)).observed(bits)
    found = error(x, observed.low, observed.high, bits, symmetric=symmetric)
    tried = [error(x, x.min() * i / 128, x.max() * i / 128, bits, symmetric=symmetric) for i in range(1, 129)]
    assert found <= min(tried) * (1.02 if bits < 8 else 1.08) + 1e-12


def test_squared_error_by_channel_is_that_of_each_channel_alone() -> None:
    x = torch.stack([noise(500), noise(500, seed=1) * 10, torch.zeros(500)])
    together = fed(SquaredError, PerChannel(0), x).observed(3)
    for row in range(3):
        alone = fed(SquaredError, PerChannel(0), x[row : row + 1]).observed(3)
        assert torch.equal(together.low[row], alone.low[0])
        assert torch.equal(together.high[row], alone.high[0])


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("value", [0.0, 3.0, -0.25, 2.0**-120, 2.0**100])
def test_constant_tensor_range_does_not_exceed_its_value(make: Make, value: float) -> None:
    observed = fed(make, PerTensor(), torch.full((50,), value)).observed(4)
    assert min(value, 0.0) <= float(observed.low) <= float(observed.high) <= max(value, 0.0)
    assert float(observed.mean_abs) == pytest.approx(abs(value))


@pytest.mark.parametrize("make", ALL)
def test_empty_batches_are_ignored_and_no_batch_is_refused(make: Make) -> None:
    observer = fed(make, PerTensor(), torch.zeros(0, 3))
    with pytest.raises(ValueError, match="nothing was observed; feed at least one non-empty batch"):
        observer.observed(8)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("make", ALL)
def test_nan_and_infinity_are_refused(make: Make, bad: float) -> None:
    with pytest.raises(ValueError, match="saw NaN or infinity; check the calibration images and the weights"):
        fed(make, PerTensor(), torch.tensor([1.0, bad]))


def test_observers_of_two_kinds_do_not_merge() -> None:
    with pytest.raises(ValueError, match="MinMax: cannot merge a MovingAverage"):
        fed(MinMax, PerTensor(), noise(3)).merge(fed(MovingAverage, PerTensor(), noise(3)))


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"MovingAverage: momentum must be in \[0, 1\), got 1"):
        MovingAverage(granularity=PerTensor(), momentum=1.0)
    with pytest.raises(ValueError, match="SquaredError: candidates must be at least 2, got 1"):
        SquaredError(granularity=PerTensor(), candidates=1)
    with pytest.raises(ValueError, match=r"Percentile: percentile must be in \(0, 100\], got 0"):
        Percentile(granularity=PerTensor(), percentile=0)
    with pytest.raises(ValueError, match=r"Entropy: stride must be in 1\.\.2048, got 0"):
        Entropy(granularity=PerTensor(), stride=0)
    wrong: Any = "cauchy"
    with pytest.raises(ValueError, match=r"AnalyticError: distribution must be one of \['laplace', 'gauss', 'auto'\]"):
        AnalyticError(granularity=PerTensor(), distribution=wrong)
