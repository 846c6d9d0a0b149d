"""Ternary quantizers: TWN against a search of all ternary tensors, TTQ against its paper's gradients."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qtrain.functional.ternary import best_ternary_threshold
from qtrain.quantizers.binary.ttq import TTQ
from qtrain.quantizers.binary.twn import TWN
from qtrain.spec import Observed, PerChannel, PerTensor, QuantSpec


def weight_spec(*shape: int) -> QuantSpec:
    return QuantSpec(bits=2, shape=shape, signed=True)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def least_error(w: Tensor) -> float:
    """The least ``||w - alpha t||^2`` over all 3^n ternary ``t`` and their best ``alpha >= 0``, one by one."""
    best = float(w.square().sum())
    for signs in itertools.product((-1.0, 0.0, 1.0), repeat=len(w)):
        t = torch.tensor(signs, dtype=torch.float64)
        if t.any() and (alpha := float(w @ t / t.square().sum())) > 0:
            best = min(best, float((w - alpha * t).square().sum()))
    return best


@pytest.mark.parametrize("seed", range(4))
def test_exact_twn_is_the_nearest_of_all_ternary_filters(seed: int) -> None:
    w = noise(3, 7, seed=seed)
    found = TWN(spec=weight_spec(3, 7), granularity=PerChannel(0), exact=True).quantize(w).dequantize()
    for row, ternary in zip(w.double(), found.double(), strict=True):
        assert float((row - ternary).square().sum()) == pytest.approx(least_error(row), rel=1e-5)


@given(st.lists(st.sampled_from([0.0, 1e-20, 0.5, 0.5, 1.0, 1.0, 2.0, 3.5]), min_size=1, max_size=6))
def test_exact_twn_handles_equal_magnitudes_and_zeros(magnitudes: list[float]) -> None:
    w = torch.tensor(magnitudes)
    kept = w[w > best_ternary_threshold(w.reshape(1, -1))].double()
    error = float(w.double().square().sum()) - (float(kept.sum()) ** 2 / len(kept) if len(kept) else 0.0)
    assert error == pytest.approx(least_error(w.double()), rel=1e-6, abs=1e-12)


def test_usual_twn_is_as_near_to_the_best_as_its_paper_says() -> None:
    """Eq. 6: 0.75 sigma is best for a normal distribution, and 0.7 mean |W| approximates it within a few per mille."""
    w = noise(64, 1000)
    errors = {
        exact: float((w - TWN(spec=weight_spec(64, 1000), exact=exact)(w)).square().sum()) for exact in (False, True)
    }
    assert errors[True] <= errors[False] < 1.01 * errors[True]
    threshold = best_ternary_threshold(w.reshape(1, -1))
    assert float(threshold) == pytest.approx(0.612, abs=0.02), "the normal distribution's own, in sigma"


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0)])
def test_usual_twn_by_hand(granularity: Any) -> None:
    """mean |W| = 0.5, Delta = 0.35, alpha = (0.9 + 0.8) / 2."""
    w = torch.tensor([[0.9, -0.8, 0.2, -0.1]])
    quantizer = TWN(spec=weight_spec(1, 4), granularity=granularity)
    stored = quantizer.quantize(w)
    assert stored.codes.tolist() == [[1, -1, 0, 0]]
    torch.testing.assert_close(quantizer(w), torch.tensor([[0.85, -0.85, 0.0, 0.0]]))
    assert stored.nbits == 4 * 2 + 32
    leaf, upstream = w.clone().requires_grad_(), torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert torch.equal(torch.autograd.grad(quantizer(leaf), leaf, upstream)[0], upstream)


@pytest.mark.parametrize("kind", [TWN, TTQ])
def test_ternary_needs_two_bits_and_a_weight(kind: Any) -> None:
    with pytest.raises(ValueError, match=f"{kind.__name__}: bits must be 2, got 3; take another"):
        kind(spec=QuantSpec(bits=3, shape=(2, 2), signed=True))
    with pytest.raises(ValueError, match=f"{kind.__name__}: quantizes weights only"):
        kind(spec=QuantSpec(bits=2))


def learned(w: Tensor, **options: Any) -> TTQ:
    quantizer = TTQ(spec=weight_spec(*w.shape), **options)
    none = torch.zeros(())
    quantizer.calibrate_(Observed(none, none, none, w))
    return quantizer


def test_ttq_by_hand() -> None:
    """max |w| = 2, Delta = 0.1; the values start at the mean magnitudes beyond it, 1.05 and 1.0."""
    w = torch.tensor([2.0, -1.5, 0.1, -0.1, 0.10001, 0.0, -0.5])
    quantizer = learned(w)
    stored = quantizer.quantize(w)
    assert stored.codes.tolist() == [2, 0, 1, 1, 2, 1, 0]
    torch.testing.assert_close(
        stored.dequantize(), torch.tensor([1.05, -1.0, 0.0, 0.0, 1.05, 0.0, -1.0]), rtol=1e-5, atol=0
    )
    assert stored.nbits == 7 * 2 + 3 * 32
    assert learned(w, threshold=0.5).quantize(w).codes.tolist() == [2, 0, 1, 1, 1, 1, 1]


def test_ttq_has_the_papers_gradients() -> None:
    """Eq. 7 and 8: sums over the index sets for the values, and W_p, 1 or W_n times the gradient for the weights."""
    w, upstream = noise(6, 5), noise(6, 5, seed=1)
    quantizer = learned(w, threshold=0.2)
    with torch.no_grad():
        quantizer.positive.fill_(1.7)
        quantizer.negative.fill_(0.4)
    leaf = w.clone().requires_grad_()
    values = quantizer(leaf)
    grads = torch.autograd.grad(values, [leaf, quantizer.positive, quantizer.negative], upstream)
    delta = 0.2 * w.abs().max()
    above, below = w > delta, w < -delta
    assert above.any()
    assert below.any()
    assert not (above | below).all()
    torch.testing.assert_close(values.detach(), 1.7 * above - 0.4 * below)
    torch.testing.assert_close(grads[0], upstream * (1.7 * above + 0.4 * below + 1.0 * ~(above | below)))
    torch.testing.assert_close(grads[1], upstream[above].sum())
    torch.testing.assert_close(grads[2], -upstream[below].sum())


@pytest.mark.parametrize("threshold", [-0.1, 1.0])
def test_ttq_refuses_threshold_outside_zero_to_one(threshold: float) -> None:
    with pytest.raises(ValueError, match=r"TTQ: threshold, a share of max \|w\|, must be in \[0, 1\), got"):
        TTQ(spec=weight_spec(2, 2), threshold=threshold)
