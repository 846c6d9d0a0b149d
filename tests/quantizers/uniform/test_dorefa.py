"""DoReFa: equations 5, 8, 9 and 11 of its paper, element by element."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from qtrain.quantizers.uniform.dorefa import DoReFa
from qtrain.spec import Observed, QuantSpec


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def for_weight(weight: Tensor, bits: int) -> DoReFa:
    return DoReFa(spec=QuantSpec(bits=bits, shape=tuple(weight.shape), signed=True))


def for_input(bits: int, low: float = 0.0) -> DoReFa:
    quantizer = DoReFa(spec=QuantSpec(bits=bits, signed=low < 0))
    quantizer.calibrate_(Observed(torch.tensor(low), torch.tensor(1.0), torch.tensor(0.5)))
    return quantizer


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weights_are_equation_9(bits: int) -> None:
    weight = noise(5, 4, 3, 3) * 0.3
    largest = max(abs(math.tanh(w)) for w in weight.flatten().tolist())
    levels = 2**bits - 1
    expected = [
        2 * math.floor((math.tanh(w) / (2 * largest) + 0.5) * levels + 0.5) / levels - 1
        for w in weight.flatten().tolist()
    ]
    result = for_weight(weight, bits)(weight)
    torch.testing.assert_close(result.flatten(), torch.tensor(expected), rtol=1e-6, atol=1e-6)
    assert result.abs().max() == 1, "the largest weight takes the outermost level, whatever its size"
    assert len(result.unique()) <= 2**bits


def test_two_bits_by_hand() -> None:
    """tanh(w) is -0.8, -0.2, 0.3, 0.8; halved by 0.8 and shifted 0, 0.375, 0.6875, 1; times 3 and rounded: 0 1 2 3."""
    weight = torch.tensor([-0.8, -0.2, 0.3, 0.8]).atanh()
    quantizer = for_weight(weight, 2)
    stored = quantizer.quantize(weight)
    assert stored.codes.tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(quantizer(weight), torch.tensor([-1.0, -1 / 3, 1 / 3, 1.0]))
    assert stored.nbits == 4 * 2 + 64


def test_one_bit_is_the_sign_times_the_mean_magnitude() -> None:
    """Equation 8, and its gradient, which passes unchanged also where |w| > 1."""
    weight = torch.tensor([-1e-12, 0.0, 2.0, -4.0], requires_grad=True)
    quantizer = for_weight(weight, 1)
    y = quantizer(weight)
    assert y.tolist() == [-1.5, 1.5, 1.5, -1.5]
    upstream = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert torch.equal(torch.autograd.grad(y, weight, upstream)[0], upstream)
    assert torch.equal(quantizer.quantize(weight).dequantize(), y)


def test_the_gradient_of_weights_is_that_of_the_formula_without_rounding() -> None:
    """Difference quotients in float64 of ``tanh(w) / max|tanh(w)|``, whose maximum has a share in it."""
    weight, upstream = noise(30) * 0.5, noise(30, seed=1).double()

    def smooth(values: Tensor) -> Tensor:
        bounded = values.tanh()
        return (bounded / bounded.abs().max() * upstream).sum()

    leaf = weight.clone().requires_grad_()
    (grad,) = torch.autograd.grad(for_weight(weight, 4)(leaf), leaf, upstream.float())
    h = 1e-6
    for i in range(30):
        shift = torch.zeros(30, dtype=torch.float64)
        shift[i] = h
        quotient = (smooth(weight.double() + shift) - smooth(weight.double() - shift)) / (2 * h)
        assert grad[i].item() == pytest.approx(quotient.item(), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_inputs_are_clipped_to_one(bits: int) -> None:
    """Equation 5 and 11; the gradient passes inside."""
    quantizer, levels = for_input(bits), 2**bits - 1
    x = noise(1000).requires_grad_()
    y = quantizer(x)
    expected = ((x.detach().double().clamp(0, 1) * levels).round() / levels).float()
    torch.testing.assert_close(y.detach(), expected, rtol=1e-6, atol=1e-7)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad, ((x >= 0) & (x <= 1)).float())


def test_signed_inputs_are_clipped_on_both_sides() -> None:
    y = for_input(3, low=-1.0)(torch.tensor([-4.0, -0.4, 0.0, 0.4, 4.0]))
    torch.testing.assert_close(y, torch.tensor([-1.0, -1 / 3, 0.0, 1 / 3, 1.0]))


def test_inputs_can_be_zero_and_weights_cannot() -> None:
    assert for_input(4).keeps_zero
    weight = torch.zeros(3, 2)
    assert not for_weight(weight, 4).keeps_zero
    assert for_weight(weight, 4)(weight).abs().max() == pytest.approx(1 / 15)
