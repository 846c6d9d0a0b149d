"""Percentiles against numpy's, and on data whose quantiles are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qtrain.observers.percentile import Percentile, histogram_quantile
from qtrain.spec import PerChannel, PerTensor


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def bounds(x: Tensor, percentile: float) -> tuple[float, float]:
    observer = Percentile(granularity=PerTensor(), percentile=percentile)
    observer.update(x)
    observed = observer.observed(4)
    return float(observed.low), float(observed.high)


@pytest.mark.parametrize("percentile", [50.0, 90.0, 99.0, 99.9, 100.0])
@pytest.mark.parametrize("data", ["normal", "relu", "shifted", "negative"])
def test_percentiles_match_numpy(data: str, percentile: float) -> None:
    """Between the order statistics next to numpy's, and a bin's relative width, 1/256."""
    x = {
        "normal": noise(20000),
        "relu": noise(20000).relu(),
        "shifted": noise(20000) * 0.1 + 3,
        "negative": -noise(20000).abs() - 1,
    }[data]
    for found, share in zip(bounds(x, percentile), (50 - percentile / 2, 50 + percentile / 2), strict=True):
        below, above = np.percentile(x.double().numpy(), np.clip([share - 0.005, share + 0.005], 0, 100))
        assert below - abs(below) / 256 <= found <= above + abs(above) / 256


def test_a_hundred_percent_is_the_range() -> None:
    x = noise(1000)
    assert bounds(x, 100.0) == (float(x.min()), float(x.max()))


def test_an_outlier_is_left_out() -> None:
    x = torch.cat([noise(9999), torch.tensor([1e4])])
    assert bounds(x, 99.9)[1] < 5


def test_interpolation_by_hand() -> None:
    """Two values in [0, 1), six in [1, 4): a quarter lies below 1, five eighths below 2.5."""
    counts, near, far = torch.tensor([[2, 6]]), torch.tensor([0.0, 1.0]), torch.tensor([1.0, 4.0])
    for share, expected in ((0.0, 0.0), (0.125, 0.5), (0.25, 1.0), (0.625, 2.5), (1.0, 4.0)):
        assert histogram_quantile(counts, near, far, share).tolist() == [expected]


@given(st.lists(st.floats(-1e4, 1e4, width=16), min_size=1, max_size=50), st.floats(1, 100))
def test_the_range_lies_in_what_was_seen_and_grows(values: list[float], percentile: float) -> None:
    x = torch.tensor(values)
    low, high = bounds(x, percentile)
    assert x.min() <= low <= high <= x.max()
    wider = bounds(x, (percentile + 100) / 2)
    assert wider[0] <= low
    assert high <= wider[1]


def test_channels_are_independent() -> None:
    x = torch.stack([noise(500), noise(500, seed=1) * 10])
    together = Percentile(granularity=PerChannel(0), percentile=90.0)
    together.update(x)
    for row in range(2):
        assert (float(together.observed(4).low[row]), float(together.observed(4).high[row])) == bounds(x[row], 90.0)
