"""LSQ+: equations 3 to 8 of its paper, and torch's operator with a learned zero point."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from torch import Tensor

from qtrain.functional.affine import fake_quantize
from qtrain.quantizers.uniform.lsq_plus import LSQPlus
from qtrain.spec import Observed, PerChannel, QuantSpec

INPUT = QuantSpec(bits=4)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def observed(low: float, high: float, tensor: Tensor | None = None) -> Observed:
    return Observed(torch.tensor(low), torch.tensor(high), torch.tensor(1.0), tensor)


def for_inputs(scale: float, offset: float, bits: int = 4) -> LSQPlus:
    quantizer = LSQPlus(spec=QuantSpec(bits=bits))
    with torch.no_grad():
        quantizer.scale.fill_(scale)
        assert quantizer.offset is not None
        quantizer.offset.fill_(offset)
    return quantizer


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_values_and_gradients_are_those_of_the_paper(bits: int) -> None:
    """Equations 3, 4 and 5 in float64, and LSQ's factor 1 / sqrt(N Qp) with N the elements of one sample."""
    quantizer = for_inputs(0.3, -0.4, bits)
    x, upstream = (noise(7, 40) * 3).requires_grad_(), noise(7, 40, seed=1)
    y = quantizer(x)
    grad_x, grad_scale, grad_offset = torch.autograd.grad(y, [x, quantizer.scale, quantizer.offset], upstream)
    high = 2**bits - 1
    scale, offset = quantizer.scale.item(), quantizer.offset.item()  # type: ignore[union-attr]
    t = (x.detach().double() - offset) / scale
    inside = (t > 0) & (t < high)
    torch.testing.assert_close(y.detach().double(), t.clamp(0, high).round() * scale + offset, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad_x, upstream * inside, rtol=1e-6, atol=0)
    factor = 1 / math.sqrt(40 * high)
    for_scale = torch.where(inside, t.round() - t, t.clamp(0, high))
    torch.testing.assert_close(grad_scale.double(), (for_scale * upstream).sum() * factor, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grad_offset.double(), (~inside * upstream).sum().double() * factor, rtol=1e-4, atol=1e-4)


def test_inputs_agree_with_torchs_learnable_operator() -> None:
    """There the zero point is learned, ``b = -z s``: by the chain rule ``dz = -s db`` and ``ds' = ds - z db``."""
    scale, zero = torch.tensor([0.25], requires_grad=True), torch.tensor([5.0], requires_grad=True)
    quantizer = for_inputs(0.25, -1.25)
    x = noise(6, 500, seed=4) * 2
    steps = x / 0.25 + 5
    # torch asks whether the rounded code is in range, the paper whether the value is.
    x = torch.where(((steps >= 0) & (steps <= 15)) == ((steps.round() >= 0) & (steps.round() <= 15)), x, 0.1)
    x = x.requires_grad_()
    factor = 1 / math.sqrt(500 * 15)
    theirs = torch._fake_quantize_learnable_per_tensor_affine(x, scale, zero, 0, 15, factor)
    ours = quantizer(x)
    assert torch.equal(ours, theirs)
    their_x, their_scale, their_zero = torch.autograd.grad(theirs.exp().sum(), [x, scale, zero])
    our_x, our_scale, our_offset = torch.autograd.grad(ours.exp().sum(), [x, quantizer.scale, quantizer.offset])
    assert torch.equal(our_x, their_x)
    assert ((our_x == 0).any(), (our_x != 0).any()) == (True, True)
    torch.testing.assert_close(-0.25 * our_offset, their_zero[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(our_scale - 5 * our_offset, their_scale[0], rtol=1e-4, atol=1e-4)


def test_weights_agree_with_torchs_learnable_operator() -> None:
    x = noise(4000, seed=2)
    t = x / 0.25
    x = x[((t >= -8) & (t <= 7)) == ((t.round() >= -8) & (t.round() <= 7))].requires_grad_()
    quantizer = LSQPlus(spec=QuantSpec(bits=4, shape=tuple(x.shape), signed=True))
    with torch.no_grad():
        quantizer.scale.fill_(0.25)
    scale, zero = torch.tensor([0.25], requires_grad=True), torch.zeros(1)
    factor = 1 / math.sqrt(len(x) * 7)
    theirs = torch._fake_quantize_learnable_per_tensor_affine(x, scale, zero, -8, 7, factor)
    ours = quantizer(x)
    assert torch.equal(ours, theirs)
    our_x, our_scale = torch.autograd.grad(ours.exp().sum(), [x, quantizer.scale])
    their_x, their_scale = torch.autograd.grad(theirs.exp().sum(), [x, scale])
    assert torch.equal(our_x, their_x)
    torch.testing.assert_close(our_scale, their_scale[0], rtol=1e-4, atol=1e-4)
    assert quantizer.offset is None


@pytest.mark.parametrize("bits", [2, 4])
def test_weights_start_at_three_deviations(bits: int) -> None:
    """Equation 6 for each channel, with Python's statistics."""
    weight = noise(3, 4, 3, 3) * torch.tensor([0.1, 1.0, 5.0]).reshape(3, 1, 1, 1) + 0.2
    spec = QuantSpec(bits=bits, shape=(3, 4, 3, 3), signed=True)
    quantizer = LSQPlus(spec=spec, granularity=PerChannel(0))
    quantizer.calibrate_(observed(-1.0, 1.0, weight))
    for row, scale in zip(weight.flatten(1).tolist(), quantizer.scale.flatten().tolist(), strict=True):
        mean, deviation = statistics.fmean(row), statistics.pstdev(row)
        expected = max(abs(mean - 3 * deviation), abs(mean + 3 * deviation)) / 2 ** (bits - 1)
        assert scale == pytest.approx(expected, rel=1e-5)


def test_weights_without_tensor_start_at_the_observed_range() -> None:
    quantizer = LSQPlus(spec=QuantSpec(bits=4, shape=(5,), signed=True))
    quantizer.calibrate_(observed(-4.0, 2.0))
    assert quantizer.scale.item() == 0.5


def test_inputs_start_with_all_codes_on_the_observed_range() -> None:
    """h-swish: nothing below -0.375, which LSQ's symmetric codes would spend half of their number on."""
    quantizer = LSQPlus(spec=INPUT)
    quantizer.calibrate_(observed(-0.375, 3.375))
    codes = quantizer.quantize(torch.tensor([-9.0, -0.375, 0.0, 0.125, 3.375, 9.0])).codes
    assert codes.tolist() == [0, 0, 2, 2, 15, 15]
    assert quantizer(torch.tensor([-9.0, 9.0])).tolist() == [-0.375, 3.375]
    assert not quantizer.keeps_zero
    assert LSQPlus(spec=QuantSpec(bits=4, shape=(2,), signed=True)).keeps_zero


def test_input_codes_stay_unsigned_after_negative_values() -> None:
    quantizer = LSQPlus(spec=INPUT)
    quantizer.calibrate_(observed(-3.0, 3.0))
    assert (int(quantizer.code_low), int(quantizer.code_high)) == (0, 15)
    assert quantizer.storage_bits() == 64


@pytest.mark.parametrize("scale", [0.0, -0.25])
def test_step_at_or_below_zero_stays_usable(scale: float) -> None:
    quantizer = for_inputs(scale, 0.5)
    x = noise(10)
    assert torch.isfinite(quantizer(x)).all()
    assert torch.equal(quantizer(x), quantizer.quantize(x).dequantize())
    if scale:
        assert torch.equal(quantizer(x), for_inputs(0.25, 0.5)(x))


def test_without_an_offset_it_is_lsq() -> None:
    x = noise(100)
    low, high = torch.tensor(0.0), torch.tensor(15.0)
    assert torch.equal(for_inputs(0.2, 0.0)(x), fake_quantize(x, torch.tensor(0.2), low, high))
