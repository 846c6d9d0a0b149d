"""LQ-Nets: levels by search, least squares against torch and the optimum of all assignments, gradients as printed."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from qtrain.observers.min_max import MinMax
from qtrain.quantizers.codebook.lq_nets import LQNets
from qtrain.spec import PerChannel, PerTensor, QuantSpec

SHAPE = (6, 4, 3, 3)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def made(x: Tensor, bits: int = 2, *, weight: bool = True, granularity: PerTensor | PerChannel | None = None) -> LQNets:
    spec = QuantSpec(bits=bits, shape=tuple(x.shape), signed=True) if weight else QuantSpec(bits=bits)
    quantizer = LQNets(spec=spec, granularity=granularity or PerTensor())
    observer = MinMax(granularity=quantizer.granularity)
    observer.update(x)
    quantizer.calibrate_(observer.observed(bits)._replace(tensor=x if weight else None))
    return quantizer


def levels_of(basis: list[float], digits: tuple[int, int]) -> Tensor:
    words = itertools.product(digits, repeat=len(basis))
    return torch.tensor([sum(d * v for d, v in zip(word, basis, strict=True)) for word in words], dtype=torch.float64)


@pytest.mark.parametrize("basis", [[0.7], [0.3, 1.0], [1.0, 0.3], [0.4, 0.5, 1.1], [-0.2, 0.5, 1.1, 0.1]])
@pytest.mark.parametrize("signed", [True, False])
def test_values_are_the_nearest_sums_of_the_basis(basis: list[float], signed: bool) -> None:
    quantizer = LQNets(spec=QuantSpec(bits=len(basis), signed=signed)).eval()
    quantizer.basis.copy_(torch.tensor(basis))
    x = noise(300)
    levels = levels_of(basis, (-1, 1) if signed else (0, 1))
    nearest = levels[(x.double()[:, None] - levels).abs().argmin(1)]
    torch.testing.assert_close(quantizer(x).double(), nearest, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0)])
@pytest.mark.parametrize("signed", [True, False])
def test_the_basis_is_the_least_squares_solution(granularity: PerTensor | PerChannel, signed: bool) -> None:
    """Against torch's own solver, in float64; digits are those of the nearest of all levels, one row for each group."""
    x = noise(3, 200) if signed else noise(3, 200).relu()
    spec = QuantSpec(bits=2, shape=(3, 200), signed=signed)
    quantizer = LQNets(spec=spec, granularity=granularity, decay=0.0)
    start = noise(2, *quantizer.state_shape, seed=1).abs()
    quantizer.basis.copy_(start)
    quantizer.train()(x)
    rows, digit = granularity.flatten(x), (-1, 1) if signed else (0, 1)
    words = torch.tensor(list(itertools.product(digit, repeat=2)), dtype=torch.float64)
    for group, row in enumerate(rows.double()):
        levels = words @ start.reshape(2, -1)[:, group].double()
        digits = words[(row[:, None] - levels).abs().argmin(1)]
        exact = torch.linalg.lstsq(digits, row[:, None]).solution[:, 0]
        found = quantizer.basis.reshape(2, -1)[:, group].double()
        torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0)])
def test_the_squared_error_never_grows(bits: int, granularity: PerTensor | PerChannel) -> None:
    x = noise(*SHAPE)
    quantizer = LQNets(spec=QuantSpec(bits=bits, shape=SHAPE, signed=True), granularity=granularity)
    errors = [(quantizer(x) - x).square().sum().item() for _ in range(60)]
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(errors))
    assert errors[-1] < 0.9 * errors[0]


@pytest.mark.parametrize("seed", range(5))
def test_one_signed_bit_is_the_best_binary_scale(seed: int) -> None:
    """Two levels -v and v: of all assignments of signs, tried, the best is sign(x) with v = mean|x|."""
    x = noise(8, seed=seed)
    least = min(
        float((x.double() - s * (x.double() @ s / 8)).square().sum())
        for s in torch.tensor(list(itertools.product((-1.0, 1.0), repeat=8)), dtype=torch.float64)
    )
    quantizer = made(x, bits=1).eval()
    assert (quantizer(x).double() - x.double()).square().sum().item() == pytest.approx(least, rel=1e-5)
    torch.testing.assert_close(quantizer.basis[0], x.abs().mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_separable_weights_reach_the_optimum_of_all_assignments(seed: int) -> None:
    """Two bits, seven values near -3, -1, 1, 3: least squares for each of the 4^7 ways to give them digits."""
    x = torch.tensor([-3.0, -3.0, -1.0, -1.0, 1.0, 3.0, 3.0]) + 0.1 * noise(7, seed=seed)
    words = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=2)), dtype=torch.float64)
    picks = torch.tensor(list(itertools.product(range(4), repeat=7)))
    designs = words[picks]
    target = x.double().expand(len(picks), 7)[..., None]
    fitted = designs @ (torch.linalg.pinv(designs) @ target)
    least = (fitted - target).square().sum((1, 2)).min().item()
    assert (made(x).eval()(x).double() - x.double()).square().sum().item() == pytest.approx(least, rel=1e-3, abs=1e-6)


def test_the_basis_moves_as_a_moving_average_after_the_forward() -> None:
    x = noise(*SHAPE)
    quantizer = LQNets(spec=QuantSpec(bits=2, shape=SHAPE, signed=True), decay=0.75)
    before = quantizer.basis.clone()
    output = quantizer.train()(x)
    assert torch.equal(output, quantizer.eval().quantize(x).dequantize()) is False
    words = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=2)), dtype=torch.float64)
    digits = words[(x.double().reshape(-1, 1) - words @ before.double()).abs().argmin(1)].T
    exact = torch.linalg.lstsq(digits.T, x.double().reshape(-1, 1)).solution[:, 0]
    torch.testing.assert_close(quantizer.basis.double(), 0.75 * before.double() + 0.25 * exact, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(output.double().reshape(-1), before.double() @ digits, rtol=1e-5, atol=1e-6)
    kept = quantizer.basis.clone()
    quantizer.eval()(x * 2)
    assert torch.equal(quantizer.basis, kept)


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0)])
def test_autocast_changes_nothing(granularity: PerTensor | PerChannel) -> None:
    """Training on a GPU is under autocast, whose products of matrices have 16 bits."""
    x = noise(*SHAPE)
    plain, under = (LQNets(spec=QuantSpec(bits=3, shape=SHAPE, signed=True), granularity=granularity) for _ in "12")
    expected = plain.train()(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(under.train()(x), expected)
    assert torch.equal(plain.basis, under.basis)


def test_gradients_are_straight_through() -> None:
    """Equation 10: unchanged for weights; for inputs only between the outer levels."""
    x, upstream = (noise(*SHAPE) * 2).requires_grad_(), noise(*SHAPE, seed=1)
    weight = made(x.detach())
    (grad,) = torch.autograd.grad(weight(x), x, upstream)
    assert torch.equal(grad, upstream)
    relu = LQNets(spec=QuantSpec(bits=2, signed=False))
    relu.basis.copy_(torch.tensor([0.5, 1.0]))
    (grad,) = torch.autograd.grad(relu(x), x, upstream)
    assert torch.equal(grad, upstream * ((x > 0) & (x < 1.5)))
    zeros = torch.zeros(3, requires_grad=True)  # a ReLU's, on the lowest level
    (grad,) = torch.autograd.grad(relu.eval()(zeros).sum(), zeros)
    assert grad.tolist() == [1.0, 1.0, 1.0]


def test_two_unsigned_bits_are_stored_as_two_planes() -> None:
    quantizer = made(torch.tensor([0.0, 3.0]), weight=False)
    torch.testing.assert_close(quantizer.basis, torch.tensor([1.0, 2.0]))
    stored = quantizer.quantize(torch.tensor([0.2, 0.9, 2.1, 9.0]))
    assert stored.codes.tolist() == [[0, 1, 0, 1], [0, 0, 1, 1]]
    assert stored.dequantize().tolist() == [0.0, 1.0, 2.0, 3.0]
    assert stored.nbits == 2 * 4 + 2 * 32


def test_wrong_options_are_refused() -> None:
    with pytest.raises(ValueError, match=r"LQNets: decay must be in \[0, 1\), got 1"):
        LQNets(spec=QuantSpec(bits=2), decay=1.0)
    with pytest.raises(ValueError, match=r"LQNets: bits must be 1\.\.4, got 5"):
        LQNets(spec=QuantSpec(bits=5))
