"""The entropy observer: divergence against scipy's, the threshold against a search over all in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from torch import Tensor

from qtrain.observers.entropy import THRESHOLD_BINS, Entropy, kl_divergence
from qtrain.observers.min_max import MinMax
from qtrain.spec import PerChannel, PerTensor


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def found(x: Tensor, bits: int, stride: int = 1) -> float:
    observer = Entropy(granularity=PerTensor(), stride=stride)
    observer.update(x)
    observed = observer.observed(bits)
    return max(-float(observed.low), float(observed.high))


def divergence(counts: np.ndarray, kept: int, levels: int) -> float:
    """The definition: P has what is clipped in its last bin; Q spreads each level over its filled bins."""
    p = counts[:kept].astype(float)
    level, filled = np.arange(kept) * levels // kept, p > 0
    q = np.zeros(kept)
    for each in range(levels):
        members = filled & (level == each)
        q[members] = p[members].mean() if members.any() else 0.0
    p[-1] += counts[kept:].sum()
    return float(entropy(p, q)) if q.any() else float("inf")


@pytest.mark.parametrize("levels", [1, 3, 8, 16])
@pytest.mark.parametrize("seed", range(4))
def test_divergence_matches_scipy(levels: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts = rng.poisson(np.exp(-np.arange(40) / 8) * 30)
    counts[33:] = 0
    counts[38] = 2  # behind a gap, so that some clippings leave Q empty where P is not
    kept = torch.arange(40, levels - 1, -1)
    ours = kl_divergence(torch.from_numpy(counts).double(), kept, levels)
    theirs = [divergence(counts, int(k), levels) for k in kept]
    np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-9, atol=1e-12)
    assert np.isinf(theirs).any()
    assert np.isfinite(theirs).any()


@pytest.mark.parametrize("bits", [3, 5])
@pytest.mark.parametrize("data", ["normal", "relu", "laplace"])
def test_the_threshold_is_that_of_a_search(data: str, bits: int) -> None:
    """Values at the centers of the 2048 bins, so that it is plain into which each falls."""
    noisy = {"normal": noise(5000) / 6, "relu": noise(5000).abs() / 5, "laplace": noise(5000) * noise(5000, seed=1) / 9}
    sizes = ((noisy[data].abs() * THRESHOLD_BINS).floor().clamp(max=THRESHOLD_BINS - 1) + 0.5) / THRESHOLD_BINS
    x = torch.cat([sizes if data == "relu" else sizes * noise(5000, seed=2).sign(), torch.ones(1)])
    counts = np.histogram(x.abs().numpy(), bins=THRESHOLD_BINS, range=(0, 1))[0]
    levels = 2**bits if data == "relu" else 2 ** (bits - 1)
    tried = {kept: divergence(counts, kept, levels) for kept in range(THRESHOLD_BINS, levels - 1, -16)}
    assert found(x, bits, stride=16) == min(tried, key=lambda kept: tried[kept]) / THRESHOLD_BINS


def test_an_outlier_is_clipped_and_a_uniform_distribution_is_not() -> None:
    assert found(torch.cat([noise(5000), torch.tensor([40.0])]), 8) < 10
    assert found(torch.linspace(-1, 1, 200001), 8) > 0.98


def test_zeros_do_not_count() -> None:
    x = noise(5000).relu()
    assert found(torch.cat([x, torch.zeros(50000)]), 4) == found(x, 4)


def test_stride_reaches_nearly_the_least_divergence() -> None:
    x = noise(20000)
    assert found(x, 4, stride=8) == pytest.approx(found(x, 4), rel=0.1)


def test_zeros_and_excess_levels_keep_the_whole_range() -> None:
    whole = MinMax(granularity=PerChannel(0))
    x = torch.stack([torch.zeros(50), noise(50)])
    whole.update(x)
    for bits, rows in ((4, slice(0, 1)), (16, slice(0, 2))):  # only zeros; more levels than bins
        observer = Entropy(granularity=PerChannel(0))
        observer.update(x)
        assert torch.equal(observer.observed(bits).low[rows], whole.observed(bits).low[rows])
        assert torch.equal(observer.observed(bits).high[rows], whole.observed(bits).high[rows])


def test_channels_are_independent() -> None:
    x = torch.stack([noise(500), noise(500, seed=1) * 10])
    together = Entropy(granularity=PerChannel(0))
    together.update(x)
    for row in range(2):
        alone = Entropy(granularity=PerTensor())
        alone.update(x[row])
        assert float(together.observed(4).high[row]) == float(alone.observed(4).high)


@pytest.mark.parametrize("number", [27, 64, 144])
@pytest.mark.parametrize("bits", [2, 4])
def test_few_values_keep_their_range(number: int, bits: int) -> None:
    """The few smallest may lie in one bin, which a histogram of that bin alone describes without an error."""
    weight = torch.randn(64, number, generator=torch.Generator().manual_seed(0))
    observer = Entropy(granularity=PerChannel(0))
    observer.update(weight)
    observed = observer.observed(bits)
    reach = torch.maximum(observed.low.abs(), observed.high.abs()).flatten()
    assert bool(((weight.abs() <= reach[:, None]).float().mean(dim=1) >= 0.5).all())
