"""ABC-Net: factors by least squares, learned inputs, gradients of its paper."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qtrain.quantizers.binary.abc_net import ABCNet
from qtrain.spec import Observed, PerChannel, PerTensor, QuantSpec
from qtrain.storage.planes import BitPlanes


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def for_weight(w: Tensor, bits: int, granularity: Any = None) -> ABCNet:
    spec = QuantSpec(bits=bits, shape=tuple(w.shape), signed=True)
    return ABCNet(spec=spec, granularity=granularity or PerTensor())


def for_input(bits: int, low: float, high: float) -> ABCNet:
    quantizer = ABCNet(spec=QuantSpec(bits=bits))
    quantizer.calibrate_(Observed(torch.tensor(low), torch.tensor(high), torch.tensor(1.0)))
    return quantizer


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5])
def test_weights_are_the_least_squares_sum_of_the_papers_bases(bits: int) -> None:
    """§3.1 in float64, with numpy's own least squares, channel by channel."""
    w = noise(4, 3, 3, 3)
    stored = for_weight(w, bits, PerChannel(0)).quantize(w)
    assert isinstance(stored, BitPlanes)
    assert stored.scale is not None
    assert stored.nbits == bits * (w.numel() + 4 * 32)
    for channel in range(4):
        row = w[channel].double().numpy().ravel()
        shifts = [-1 + 2 * i / (bits - 1) for i in range(bits)] if bits > 1 else [0.0]
        bases = np.stack([np.where(row - row.mean() + u * row.std() >= 0, 1.0, -1.0) for u in shifts], axis=1)
        np.testing.assert_array_equal(2 * stored.codes[:, channel].reshape(bits, -1).numpy().T - 1, bases)
        factors = np.linalg.lstsq(bases, row, rcond=None)[0]
        np.testing.assert_allclose(stored.scale[:, channel].ravel().numpy(), factors, rtol=1e-4, atol=1e-6)


def test_more_bases_reduce_error_after_a_change_of_bits() -> None:
    w = noise(16, 27)
    quantizer, errors = for_weight(w, 1), []
    for bits in quantizer.widths:
        quantizer.set_range_(bits=bits, signed=True)
        errors.append(float((quantizer(w) - w).norm()))
        assert torch.equal(quantizer(w), for_weight(w, bits)(w))
    assert errors[0] > errors[1] > errors[2] > errors[4]


@pytest.mark.parametrize("value", [0.0, -0.3])
def test_equal_bases_of_a_constant_weight_share_the_factor(value: float) -> None:
    w = torch.full((2, 5), value)
    torch.testing.assert_close(for_weight(w, 3)(w), w)


def test_weights_get_the_gradient_times_the_sum_of_factors() -> None:
    w, upstream = noise(4, 6), noise(4, 6, seed=1)
    quantizer = for_weight(w, 3, PerChannel(0))
    leaf = w.clone().requires_grad_()
    (grad,) = torch.autograd.grad(quantizer(leaf), leaf, upstream)
    stored = quantizer.quantize(w)
    assert isinstance(stored, BitPlanes)
    assert stored.scale is not None
    torch.testing.assert_close(grad, upstream * stored.scale.sum(dim=0))


@pytest.mark.parametrize("bits", [1, 2, 3, 5])
def test_calibrated_inputs_are_rounded_to_evenly_spaced_values(bits: int) -> None:
    """N + 1 values over [0, 6], but for the constant 3 in the middle, to which the sum is symmetric."""
    x = torch.linspace(-1, 7, 400)
    step = 6 / bits
    expected = (x.double() / step).round().clamp(0, bits) * step - 3
    torch.testing.assert_close(for_input(bits, 0.0, 6.0)(x).double(), expected, rtol=1e-5, atol=1e-5)


def test_inputs_have_the_papers_gradients() -> None:
    """§3.2: 1 inside each window for x and v, and the sums of signs for beta."""
    quantizer = for_input(2, 0.0, 2.0)
    assert quantizer.beta is not None
    assert quantizer.shift is not None
    with torch.no_grad():
        quantizer.beta[1, :2] = torch.tensor([0.5, 2.0])
    # Thresholds 0.5 and 1.5: windows [0, 1] and [1, 2].
    x = torch.tensor([-0.1, 0.3, 0.7, 1.2, 1.9, 2.3], requires_grad=True)
    upstream = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    values = quantizer(x)
    assert values.tolist() == [-2.5, -2.5, -1.5, -1.5, 2.5, 2.5]
    grads = torch.autograd.grad(values, [x, quantizer.shift, quantizer.beta], upstream)
    assert grads[0].tolist() == [0, 1, 2, 16, 32, 0]
    shift, beta = torch.zeros(5, 5), torch.zeros(5, 5)
    shift[1, :2] = torch.tensor([0.5 * (2 + 4), 2.0 * (8 + 16)])
    beta[1, :2] = torch.tensor([-1.0 - 2 + 4 + 8 + 16 + 32, -1.0 - 2 - 4 - 8 + 16 + 32])
    assert torch.equal(grads[1], shift)
    assert torch.equal(grads[2], beta)
    assert quantizer.storage_bits() == 2 * 32


def test_at_most_five_bases() -> None:
    with pytest.raises(ValueError, match=r"ABCNet: bits must be 1\.\.5, got 6; take another quantizer for this width"):
        ABCNet(spec=QuantSpec(bits=6))
