"""What is particular to a quantizer; what all have in common is in tests/test_laws.py."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from qtrain.functional.learned_step import SMALLEST_SCALE
from qtrain.observers.min_max import MinMax
from qtrain.quantizers.uniform.affine import Affine
from qtrain.quantizers.uniform.lsq import LSQ
from qtrain.spec import Observed, PerChannel, PerTensor, QuantSpec

WEIGHT = QuantSpec(bits=4, shape=(8, 3, 3, 3), signed=True)
INPUT = QuantSpec(bits=4)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def observed(low: float, high: float, mean_abs: float = 1.0) -> Observed:
    return Observed(torch.tensor(low), torch.tensor(high), torch.tensor(mean_abs))


@pytest.mark.parametrize("kind", [Affine, LSQ])
def test_the_data_decide_the_sign_of_inputs_and_never_of_weights(kind: type[Affine] | type[LSQ]) -> None:
    relu = kind(spec=INPUT)
    relu.calibrate_(observed(0.0, 3.0))
    assert (int(relu.code_low), int(relu.code_high), bool(relu.signed)) == (0, 15, False)
    relu.calibrate_(observed(-0.1, 3.0))
    assert (int(relu.code_low), int(relu.code_high), bool(relu.signed)) == (-8, 7, True)
    weight = kind(spec=QuantSpec(bits=4, shape=(2, 2), signed=True))
    weight.calibrate_(observed(0.5, 3.0))
    assert bool(weight.signed)


@pytest.mark.parametrize("kind", [Affine, LSQ])
def test_calibration_keeps_the_state_tensors(kind: type[Affine] | type[LSQ]) -> None:
    """Principle 3: an optimizer or a checkpoint that looked before calibration still holds the right tensors."""
    quantizer = kind(spec=WEIGHT, granularity=PerChannel(0))
    before = {name: (id(t), t.shape) for name, t in [*quantizer.named_parameters(), *quantizer.named_buffers()]}
    assert not bool(quantizer.initialized)
    observer = MinMax(granularity=PerChannel(0))
    observer.update(noise(8, 3, 3, 3))
    quantizer.calibrate_(observer.observed(4))
    after = {name: (id(t), t.shape) for name, t in [*quantizer.named_parameters(), *quantizer.named_buffers()]}
    assert before == after
    assert bool(quantizer.initialized)
    assert quantizer.scale.shape == (8, 1, 1, 1)


@pytest.mark.parametrize("kind", [Affine, LSQ])
def test_one_signed_bit_is_refused(kind: type[Affine] | type[LSQ]) -> None:
    with pytest.raises(ValueError, match=f"{kind.__name__}: 1 bit.* leave no positive code; use at least 2 bits"):
        kind(spec=QuantSpec(bits=1, shape=(2, 2), signed=True))
    assert kind(spec=QuantSpec(bits=1, signed=False)).code_high == 1


@pytest.mark.parametrize("bits", [0, 17, 32])
def test_bits_out_of_range_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"QuantSpec: bits must be in 1..16, got {bits}"):
        QuantSpec(bits=bits)


def test_affine_agrees_with_a_hand_worked_example() -> None:
    """[-1, 3] in 2 bits with a zero point: s = 4/3, z = round(0.75) = 1, codes stand for -4/3, 0, 4/3, 8/3."""
    quantizer = Affine(spec=QuantSpec(bits=2), symmetric=False)
    quantizer.calibrate_(observed(-1.0, 3.0))
    stored = quantizer.quantize(torch.tensor([-1.0, 0.0, 0.5, 1.0, 3.0, 9.0]))
    assert stored.codes.tolist() == [0, 1, 1, 2, 3, 3]
    expected = torch.tensor([-4 / 3, 0.0, 0.0, 4 / 3, 8 / 3, 8 / 3])
    torch.testing.assert_close(stored.dequantize(), expected)
    assert stored.nbits == 6 * 2 + 32 + 2


def test_narrow_range_is_symmetric() -> None:
    quantizer = Affine(spec=WEIGHT, narrow=True)
    assert (int(quantizer.code_low), int(quantizer.code_high)) == (-7, 7)


def test_lsq_starts_as_its_paper_says() -> None:
    x = noise(8, 3, 3, 3)
    observer = MinMax(granularity=PerTensor())
    observer.update(x)
    quantizer = LSQ(spec=WEIGHT)
    quantizer.calibrate_(observer.observed(4))
    torch.testing.assert_close(quantizer.scale.detach(), 2 * x.abs().mean() / math.sqrt(7))
    fitted = LSQ(spec=WEIGHT, init="range")
    fitted.calibrate_(observer.observed(4))
    torch.testing.assert_close(fitted.scale.detach(), x.abs().max() / 7)


@pytest.mark.parametrize(
    ("spec", "granularity", "shape", "shared"),
    [
        (WEIGHT, PerTensor(), (8, 3, 3, 3), 216),
        (WEIGHT, PerChannel(0), (8, 3, 3, 3), 27),
        (INPUT, PerTensor(), (5, 8, 2, 2), 32),  # of an activation, the elements of one sample
        (INPUT, PerTensor(), (), 1),
    ],
)
def test_lsq_scales_the_steps_gradient(
    spec: QuantSpec, granularity: PerTensor | PerChannel, shape: tuple[int, ...], shared: int
) -> None:
    """§2.2: g = 1 / sqrt(N Qp), on the gradient of equation 3, in float64 by hand."""
    quantizer = LSQ(spec=spec, granularity=granularity)
    with torch.no_grad():
        quantizer.scale.fill_(0.3)
    x, upstream = noise(*shape) * 2, noise(*shape, seed=1)
    (grad,) = torch.autograd.grad(quantizer(x), quantizer.scale, upstream)
    t = x.double() / quantizer.scale.detach().double()
    inside = (t > -8) & (t < 7)
    each = torch.where(inside, t.round() - t, t.clamp(-8, 7)) * upstream.double()
    summed = each.sum_to_size(quantizer.scale.shape) if quantizer.scale.ndim else each.sum()
    torch.testing.assert_close(grad.double(), summed / math.sqrt(shared * 7), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, -0.25])
def test_lsq_step_at_or_below_zero_stays_usable(scale: float) -> None:
    quantizer = LSQ(spec=INPUT)
    with torch.no_grad():
        quantizer.scale.fill_(scale)
    x = noise(10)
    assert quantizer.step() >= SMALLEST_SCALE
    assert torch.isfinite(quantizer(x)).all()
    assert torch.equal(quantizer(x), quantizer.quantize(x).dequantize())
    if scale:
        assert quantizer.step() == 0.25


def test_lsq_refuses_an_unknown_start() -> None:
    with pytest.raises(ValueError, match="LSQ: init must be 'mean_abs' or 'range', got 'median'"):
        LSQ(spec=INPUT, init="median")


def test_per_channel_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"PerChannel: axis 0 is outside .* use PerTensor\(\)"):
        LSQ(spec=INPUT, granularity=PerChannel(0))
