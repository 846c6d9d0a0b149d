"""IR-Net against its paper: balance, shift and the estimator's schedule in float64, gradients by finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qtrain.observers.min_max import MinMax
from qtrain.quantizers.binary.ir_net import IRNet, shift_scale
from qtrain.quantizers.hooks import begin_step_
from qtrain.spec import PerChannel, PerTensor, QuantSpec

INPUT = QuantSpec(bits=1)


def weight_spec(*shape: int) -> QuantSpec:
    return QuantSpec(bits=1, shape=shape, signed=True)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def at(progress: float, quantizer: IRNet) -> IRNet:
    begin_step_(quantizer, seed=0, step=1, progress=progress)
    return quantizer.train()


def filters() -> Tensor:
    """Filters of unlike spread and mean: dense, sparse, far from zero, all of one sign."""
    w = noise(4, 3, 3, 3)
    w[1] *= noise(3, 3, 3, seed=1) > 1.2
    w[2] = w[2] * 0.01 + 5
    w[3] = w[3].abs() * 40
    return w


def by_hand(w: Tensor) -> tuple[Tensor, Tensor]:
    """Standardized weights and ``2^s`` of each filter, in float64 and filter by filter."""
    standard, scales = [], []
    for row in w.double():
        center = sum(row.flatten().tolist()) / row.numel()
        off = row - center
        standard.append(off / math.sqrt(float((off * off).sum()) / (row.numel() - 1)))
        scales.append(2.0 ** round(math.log2(float(standard[-1].abs().sum()) / row.numel())))
    return torch.stack(standard), torch.tensor(scales, dtype=torch.float64)


def test_weights_are_balanced_and_scaled_by_a_power_of_two() -> None:
    """Eq. 5-7."""
    w = filters()
    quantizer = IRNet(spec=weight_spec(*w.shape))
    standard, scales = by_hand(w)
    assert scales.unique().numel() > 1, "the sparse filter has another shift"
    assert torch.equal(quantizer(w).double(), standard.sign() * scales.view(-1, 1, 1, 1))
    share = (quantizer(w) > 0).double().mean(dim=(1, 2, 3))
    assert ((share > 0.25) & (share < 0.75))[[0, 2, 3]].all(), "both signs, though two have positive weights only"
    assert quantizer.storage_bits() == 4 * 32


def test_the_power_of_two_is_exact_and_nearest_in_the_logarithm() -> None:
    for exponent in (-20, -3, -1, 0, 4):
        for factor, shift in ((1.0, 0), (1.41, 0), (1.42, 1), (0.708, 0), (0.707, -1)):
            w = torch.full((1, 4), factor * 2.0**exponent)
            assert shift_scale(w, PerChannel(0)).tolist() == [[2.0 ** (exponent + shift)]]


def test_a_filter_without_any_spread_is_zero_and_has_no_gradient() -> None:
    w = filters()
    w[0], w[3] = 0.0, -0.3
    leaf = w.clone().requires_grad_()
    values = IRNet(spec=weight_spec(*w.shape))(leaf)
    (grad,) = torch.autograd.grad(values, leaf, noise(*w.shape))
    for tensor in (values, grad):
        assert tensor[[0, 3]].abs().max() == 0
        assert tensor[[1, 2]].abs().max() > 0


@pytest.mark.parametrize("progress", [0.0, 0.3, 0.5, 0.8, 1.0])
def test_the_gradient_follows_the_schedule(progress: float) -> None:
    """Eq. 9-11 for inputs: ``k t (1 - tanh^2(t x))`` in float64, with ``t`` from 0.1 to 10."""
    x, upstream = noise(200) * 2, noise(200, seed=1)
    quantizer = at(progress, IRNet(spec=INPUT))
    t = 10 ** (-1 + 2 * progress)
    k = max(1 / t, 1)
    expected = upstream.double() * k * t * (1 - torch.tanh(t * x.double()) ** 2)
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(quantizer(leaf), leaf, upstream)
    torch.testing.assert_close(grad.double(), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(quantizer(x), x.sign())


def test_gradient_at_the_ends_of_the_schedule() -> None:
    """At first nearly the identity within one, in the end a peak of height 10 at zero; other ends by option."""
    x = torch.tensor([0.0, 1.0, -0.5, 3.0])
    for t_min, t_max, progress, slope in ((0.1, 10, 0, 1), (0.1, 10, 1, 10), (1e-3, 4, 0, 1), (1e-3, 4, 1, 4)):
        quantizer = at(progress, IRNet(spec=INPUT, t_min=t_min, t_max=t_max))
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(quantizer(leaf).sum(), leaf)
        assert float(grad[0]) == pytest.approx(slope, rel=1e-5)
        if progress == 0:
            assert ((grad > 0.9) & (grad <= 1.0)).all()
        else:
            assert grad[1] < 0.01


def test_the_gradient_flows_through_balance_and_standardization() -> None:
    """Finite differences of ``2^s k tanh(t w_std(w))`` in float64, ``2^s`` held."""
    w, upstream = filters()[[0, 3], :1], noise(2, 1, 3, 3, seed=2)
    t, k = 10**0.2, 1.0
    quantizer = at(0.6, IRNet(spec=weight_spec(*w.shape)))
    _, scales = by_hand(w)

    def surrogate(w: Tensor) -> float:
        return float((upstream.double() * scales.view(-1, 1, 1, 1) * k * torch.tanh(t * by_hand(w)[0])).sum())

    leaf = w.clone().requires_grad_()
    (grad,) = torch.autograd.grad(quantizer(leaf), leaf, upstream)
    torch.testing.assert_close(grad.double(), slopes(surrogate, w), rtol=1e-3, atol=1e-4)
    assert grad.flatten(1).sum(dim=1).abs().max() < 1e-4, "a shift of a filter changes nothing"


def slopes(function: Callable[[Tensor], float], at: Tensor, step: float = 1e-6) -> Tensor:
    """Central differences of ``function`` at each element, float64."""
    result = torch.zeros(at.numel(), dtype=torch.float64)
    for place in range(at.numel()):
        ends = [at.double().flatten() for _ in range(2)]
        ends[0][place] += step
        ends[1][place] -= step
        result[place] = (function(ends[0].view(at.shape)) - function(ends[1].view(at.shape))) / (2 * step)
    return result.view(at.shape)


def test_inputs_behind_a_relu_are_compared_with_their_mean() -> None:
    relu = torch.tensor([0.0, 0.0, 1.0, 3.0])
    for center, threshold in ((True, 1.0), (False, 0.0)):
        quantizer = IRNet(spec=INPUT, center=center)
        observer = MinMax(granularity=PerTensor())
        observer.update(relu)
        quantizer.calibrate_(observer.observed(1))
        assert quantizer.quantize(relu).codes.tolist() == [(relu >= threshold).int().tolist()]
    assert quantizer.storage_bits() == 0


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        (INPUT, {"t_min": 0.0}, "IRNet: 0 < t_min <= t_max must hold, got t_min=0.0, t_max=10.0; the paper's"),
        (INPUT, {"t_min": 20.0}, "IRNet: 0 < t_min <= t_max must hold, got t_min=20.0"),
        (QuantSpec(bits=2), {}, "IRNet: bits must be 1, got 2; take another quantizer"),
        (weight_spec(5, 1, 1, 1), {}, r"IRNet: needs a weight of at least two values a filter.*\(5, 1, 1, 1\); name"),
    ],
)
def test_invalid_options_are_refused(spec: QuantSpec, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IRNet(spec=spec, **options)
