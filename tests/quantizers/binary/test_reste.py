"""ReSTE against its paper: the root's gradient in float64 and by finite differences, its thresholds, its schedule."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from qtrain.observers.min_max import MinMax
from qtrain.quantizers.binary.reste import ReSTE, truncated_root
from qtrain.quantizers.hooks import begin_step_
from qtrain.spec import PerTensor, QuantSpec

INPUT = QuantSpec(bits=1)


def weight_spec(*shape: int) -> QuantSpec:
    return QuantSpec(bits=1, shape=shape, signed=True)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def at(progress: float, quantizer: ReSTE) -> ReSTE:
    begin_step_(quantizer, seed=0, step=1, progress=progress)
    return quantizer.train()


def gradient(quantizer: ReSTE, x: Tensor, upstream: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(quantizer(leaf), leaf, upstream)
    return grad


def slope(x: float, order: float, near: float = 0.1, reach: float = 1.5) -> float:
    """Eq. 12 for one number."""
    if abs(x) > reach:
        return 0.0
    if abs(x) <= near:
        return (near ** (1 / order) - -(near ** (1 / order))) / (2 * near)
    return float(abs(x) ** ((1 - order) / order) / order)


@pytest.mark.parametrize(("progress", "order"), [(0.0, 1.0), (0.5, 3 - math.sqrt(2)), (2 / 3, 2.0), (1.0, 3.0)])
@pytest.mark.parametrize("kind", ["input", "weight"])
def test_the_gradient_is_the_truncated_roots(kind: str, progress: float, order: float) -> None:
    """With ``o = 1 + 2 (1 - cos(pi progress / 2))``, and for weights the filter's mean magnitude as factor."""
    x, upstream = noise(6, 50), noise(6, 50, seed=1)
    x[0, :6] = torch.tensor([0.0, 0.0999, -0.0999, 0.1001, 1.4999, -1.5001])
    weight = kind == "weight"
    quantizer = at(progress, ReSTE(spec=weight_spec(6, 50) if weight else INPUT))
    alpha = x.double().abs().mean(dim=1, keepdim=True) if weight else torch.ones(6, 1)
    by_hand = torch.tensor([[slope(float(v), order) for v in row] for row in x], dtype=torch.float64)
    found = gradient(quantizer, x, upstream).double()
    torch.testing.assert_close(found, upstream.double() * alpha * by_hand, rtol=1e-4, atol=1e-5)
    expected = alpha * torch.where(x >= 0, 1.0, -1.0)
    torch.testing.assert_close(quantizer(x).double(), expected.double(), rtol=1e-6, atol=0)


def test_gradient_starts_as_the_clipped_identity() -> None:
    x = torch.tensor([-1.6, -1.4, -0.05, 0.0, 0.05, 1.4, 1.6])
    assert gradient(at(0.0, ReSTE(spec=INPUT)), x, torch.ones(7)).tolist() == [0, 1, 1, 1, 1, 1, 0]


def test_the_root_is_continuous_and_nears_the_sign() -> None:
    """Steps of 1e-3 move the root by no more than its steepest slope allows; at both thresholds it has |x|^(1/o)."""
    x = torch.arange(-2, 2, 1e-3, dtype=torch.float32)
    last = torch.full_like(x, math.inf)
    for order in (1.0, 2.0, 3.0, 8.0):
        root = truncated_root(x, torch.tensor(order), 0.1, 1.5)
        steepest = max(slope(0.1, order), slope(0.1000001, order))
        assert root.diff().abs().max() <= steepest * 1.01e-3
        assert root.diff().min() >= 0
        ends = truncated_root(torch.tensor([0.1, 1.5, 9.0, -9.0]), torch.tensor(order), 0.1, 1.5)
        top = 1.5 ** (1 / order)
        torch.testing.assert_close(ends, torch.tensor([0.1 ** (1 / order), top, top, -top]))
        off = (root - x.sign()).abs()
        middle = (x.abs() > 0.1) & (x.abs() < 1)
        assert (off[middle] < last[middle] + 1e-6).all(), "a higher order is nearer"
        last = off


@pytest.mark.parametrize("order", [1.5, 3.0])
def test_the_gradient_by_finite_differences(order: float) -> None:
    """Of the function as it is written in float64, away from the two corners."""
    x = torch.tensor([-1.7, -1.2, -0.3, -0.07, 0.02, 0.15, 0.9, 1.45, 1.6], dtype=torch.float64)

    def root(v: Tensor) -> Tensor:
        inner = v / 0.1 * 0.1 ** (1 / order)
        outer = v.sign() * v.abs().clamp(max=1.5) ** (1 / order)
        return torch.where(v.abs() <= 0.1, inner, outer)

    differences = (root(x + 1e-6) - root(x - 1e-6)) / 2e-6
    leaf = x.float().requires_grad_()
    (grad,) = torch.autograd.grad(truncated_root(leaf, torch.tensor(order), 0.1, 1.5).sum(), leaf)
    torch.testing.assert_close(grad.double(), differences, rtol=1e-4, atol=1e-6)


def test_weights_have_a_factor_for_each_filter_and_inputs_none() -> None:
    w = torch.tensor([[1.0, -3.0], [0.0, 0.5]])
    quantizer = ReSTE(spec=weight_spec(2, 2))
    assert quantizer(w).tolist() == [[2.0, -2.0], [0.25, 0.25]]
    assert quantizer.storage_bits() == 64
    assert ReSTE(spec=INPUT)(w).tolist() == [[1, -1], [1, 1]]
    assert ReSTE(spec=INPUT).storage_bits() == 0


def test_inputs_behind_a_relu_are_compared_with_their_mean() -> None:
    relu = torch.tensor([0.0, 0.0, 1.0, 3.0])
    for center, threshold in ((True, 1.0), (False, 0.0)):
        quantizer = ReSTE(spec=INPUT, center=center)
        observer = MinMax(granularity=PerTensor())
        observer.update(relu)
        quantizer.calibrate_(observer.observed(1))
        assert quantizer.quantize(relu).codes.tolist() == [(relu >= threshold).int().tolist()]


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        (INPUT, {"o_end": 0.5}, "ReSTE: o_end must be at least 1, got 0.5; 3 is the paper's"),
        (INPUT, {"near": 0.0}, "ReSTE: 0 < near < reach must hold, got near=0.0, reach=1.5; the paper's are"),
        (INPUT, {"near": 2.0}, "ReSTE: 0 < near < reach must hold, got near=2.0"),
        (QuantSpec(bits=2), {}, "ReSTE: bits must be 1, got 2; take another quantizer"),
    ],
)
def test_invalid_options_are_refused(spec: QuantSpec, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReSTE(spec=spec, **options)
