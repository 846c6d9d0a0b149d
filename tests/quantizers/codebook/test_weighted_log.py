"""Weighted entropy of activations: the searched levels against all levels, tried on the values themselves."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from qtrain.observers.analytic_error import AnalyticError
from qtrain.observers.entropy import Entropy
from qtrain.observers.histogram import HistogramObserver
from qtrain.observers.min_max import MinMax
from qtrain.observers.percentile import Percentile
from qtrain.observers.squared_error import SquaredError
from qtrain.quantizers.codebook.weighted_log import WeightedLog
from qtrain.spec import PerTensor, QuantSpec

OBSERVERS = (Percentile, SquaredError, Entropy, AnalyticError)


def activations(count: int = 4000, seed: int = 0) -> Tensor:
    """Half of them zero, as after a ReLU."""
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)).relu()


def made(x: Tensor, bits: int = 2, observer: type[HistogramObserver] = Percentile) -> WeightedLog:
    quantizer = WeightedLog(spec=QuantSpec(bits=bits))
    seen = observer(granularity=PerTensor())
    seen.update(x)
    quantizer.calibrate_(seen.observed(bits))
    return quantizer.eval()


def entropy(sizes: list[float], first: int, step: int, levels: int) -> float:
    """-sum I_k P_k log P_k over levels 2^((first + step k) / 16), each value counted by its rounded logarithm."""
    members = [0] * levels
    for size in sizes:
        level = math.floor((16 * math.log2(size) - first) / step + 0.5)
        if level >= 0:
            members[min(level, levels - 1)] += 1
    shares = [count / len(sizes) for count in members]
    values = [2 ** ((first + step * k) / 16) for k in range(levels)]
    return -sum(value * share * math.log(share) for value, share in zip(values, shares, strict=True) if share)


def test_entropy_by_hand() -> None:
    """Of 1, 1, 4 the levels 1 and 4 have shares of 2/3 and 1/3: -(2/3 log 2/3 + 4 1/3 log 1/3)."""
    assert math.isclose(entropy([1, 1, 4], 0, 32, 2), -(2 / 3 * math.log(2 / 3) + 4 / 3 * math.log(1 / 3)))


@pytest.mark.parametrize("observer", OBSERVERS)
def test_search_finds_the_most_entropy_of_all_bases_and_places(observer: type[HistogramObserver]) -> None:
    x = activations(600)
    sizes = x[x > 0].tolist()
    quantizer = made(x, observer=observer)
    found = entropy(sizes, int(quantizer.top) - 2 * int(quantizer.step), int(quantizer.step), 3)
    top = math.ceil(16 * math.log2(max(sizes))) + 16
    tried = [entropy(sizes, first, step, 3) for step in range(2, 33, 2) for first in range(top - 160, top)]
    # A value near a boundary may fall to either side of it in a histogram.
    assert found >= 0.97 * max(tried) > 1.5 * sorted(tried)[len(tried) // 2]


def test_a_value_becomes_the_level_with_the_nearest_logarithm() -> None:
    x = activations()
    quantizer = made(x, bits=3)
    top, step = int(quantizer.top), int(quantizer.step)
    levels = [0.0, *(2 ** ((top - step * (7 - k)) / 16) for k in range(1, 8))]
    lowest = math.log2(levels[1]) - step / 32
    for value, result, code in zip(
        x[:500].tolist(), quantizer(x[:500]).tolist(), quantizer.quantize(x[:500]).codes, strict=True
    ):
        above = [k for k in range(1, 8) if value and abs(math.log2(levels[k] / value)) <= step / 32 + 1e-6]
        expected = [0] if not value or math.log2(value) < lowest else above or [7]
        assert int(code) in expected
        assert result == pytest.approx(levels[int(code)], rel=1e-6)


def test_with_a_sign_the_levels_are_those_of_the_magnitudes() -> None:
    x = torch.randn(4000, generator=torch.Generator().manual_seed(1))
    quantizer, of_sizes = made(x, bits=3), made(x.abs(), bits=2)
    assert bool(quantizer.signed) and not bool(of_sizes.signed)
    assert (int(quantizer.top), int(quantizer.step)) == (int(of_sizes.top), int(of_sizes.step))
    assert torch.equal(quantizer(x), x.sign() * of_sizes(x.abs()))
    assert quantizer.quantize(x).codes.unique().tolist() == list(range(7))


def test_the_gradient_is_a_relus() -> None:
    x = torch.tensor([-1.0, 0.0, 1e-6, 0.5, 1e6], requires_grad=True)
    upstream = torch.arange(1.0, 6.0)
    (grad,) = torch.autograd.grad(made(activations()).train()(x), x, upstream)
    assert torch.equal(grad, upstream * (x > 0))


@pytest.mark.parametrize("value", [1.0, 0.3, 3e-5, 700.0])
def test_values_that_are_all_equal_are_kept(value: float) -> None:
    x = torch.cat([torch.zeros(10), torch.full((10,), value)])
    for bits in (1, 4, 8):
        assert torch.equal(made(x, bits)(x) > 0, x > 0)
        torch.testing.assert_close(made(x, bits)(x), x, rtol=0.1, atol=0)


def test_what_is_stored_are_two_exponents_of_12_bits() -> None:
    assert made(activations()).storage_bits() == 24


def test_weights_and_observers_without_histogram_are_refused() -> None:
    with pytest.raises(ValueError, match="WeightedLog: quantizes inputs only, not a weight"):
        WeightedLog(spec=QuantSpec(bits=4, shape=(4, 4), signed=True))
    observer = MinMax(granularity=PerTensor())
    observer.update(activations())
    with pytest.raises(ValueError, match=r"needs a histogram .* take observer@quantize.input_observer=squared_error"):
        WeightedLog(spec=QuantSpec(bits=4)).calibrate_(observer.observed(4))
