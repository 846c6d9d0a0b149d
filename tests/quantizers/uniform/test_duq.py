"""DuQ: its formula in float64, difference quotients for both levels, and where they start."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from qtrain.quantizers.uniform.duq import DuQ, softplus_inverse
from qtrain.spec import Observed, PerChannel, QuantSpec


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def observed(low: float, high: float) -> Observed:
    return Observed(torch.tensor(low), torch.tensor(high), torch.tensor(1.0))


def duq(clip: float, output: float, *, bits: int = 4, signed: bool = False) -> DuQ:
    """With the raw parameters ``clip`` and ``output``, before softplus."""
    quantizer = DuQ(spec=QuantSpec(bits=bits, signed=signed))
    with torch.no_grad():
        quantizer.clip_level.fill_(clip)
        quantizer.output_level.fill_(output)
    return quantizer


def softplus(value: float) -> float:
    return math.log1p(math.exp(value))


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_one_formula_for_signed_and_unsigned(bits: int, signed: bool) -> None:
    """Clipped at -1 or 0 and at 1, rounded to 2^(b-1) - 1 or 2^b - 1 steps, scaled by the other level."""
    x = noise(1000).double() * 2
    steps = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    inner = (x / softplus(0.3)).clamp(-1 if signed else 0, 1) * steps
    expected = inner.round() / steps * softplus(-0.5)
    away = ((inner - inner.floor()) - 0.5).abs() > 1e-4
    result = duq(0.3, -0.5, bits=bits, signed=signed)(x.float()).double()
    torch.testing.assert_close(result[away], expected[away], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("signed", [False, True])
def test_gradients_are_the_difference_quotients_without_the_rounding(signed: bool) -> None:
    """Of ``c clip(x / a)`` for the clipping level; of the values themselves, which are linear in c, for the output's.

    Straight-through: the slope of rounding counts as one, where its own values stand.
    """
    x, upstream = noise(400, seed=1) * 2, noise(400, seed=2)
    raw, h = 0.3, 1e-5
    x = x[(x.abs() - softplus(raw)).abs() > 1e-3]
    upstream = upstream[: len(x)]
    quantizer = duq(raw, -0.5, bits=3, signed=signed)
    leaf = x.clone().requires_grad_()
    for_x, for_clip, for_output = torch.autograd.grad(
        quantizer(leaf), [leaf, quantizer.clip_level, quantizer.output_level], upstream
    )

    def smooth(x: Tensor, raw: float) -> Tensor:
        return softplus(-0.5) * (x.double() / softplus(raw)).clamp(-1 if signed else 0, 1)

    quotient = ((smooth(x, raw + h) - smooth(x, raw - h)) / (2 * h) * upstream).sum()
    assert for_clip.item() == pytest.approx(quotient.item(), rel=1e-3)
    each = (smooth(x.double() + h, raw) - smooth(x.double() - h, raw)) / (2 * h) * upstream
    torch.testing.assert_close(for_x.double(), each, rtol=1e-3, atol=1e-4)
    total = [(duq(raw, -0.5 + d, bits=3, signed=signed)(x).double() * upstream).sum().item() for d in (0.01, -0.01)]
    assert for_output.item() == pytest.approx((total[0] - total[1]) / 0.02, rel=1e-3)


@pytest.mark.parametrize(("low", "high", "codes"), [(-1.0, 1.75, (-7, 7)), (0.0, 3.75, (0, 15))])
def test_it_starts_as_uniform_quantization_of_the_observed_range(
    low: float, high: float, codes: tuple[int, int]
) -> None:
    quantizer = DuQ(spec=QuantSpec(bits=4))
    quantizer.calibrate_(observed(low, high))
    x = noise(1000, seed=3) * 2
    x = x[((x * 4 - (x * 4).floor()) - 0.5).abs() > 1e-3]
    expected = torch.fake_quantize_per_tensor_affine(x, 0.25, 0, *codes)
    torch.testing.assert_close(quantizer(x), expected, rtol=1e-5, atol=1e-6)


def test_h_swish_is_shifted_to_unsigned_codes() -> None:
    """Values from -0.375: 16 codes from there to the top, as if unsigned, and -0.375 the value of code zero."""
    quantizer = DuQ(spec=QuantSpec(bits=4), lower=-0.375)
    quantizer.calibrate_(observed(-0.375, 3.375))
    assert not bool(quantizer.signed)
    assert not quantizer.keeps_zero
    stored = quantizer.quantize(torch.tensor([-2.0, -0.375, -0.13, 0.13, 3.375, 9.0]))
    assert stored.codes.tolist() == [0, 0, 1, 2, 15, 15]
    expected = torch.tensor([-0.375, -0.375, -0.125, 0.125, 3.375, 3.375])
    torch.testing.assert_close(stored.dequantize(), expected)


def test_values_below_the_lower_bound_are_signed_and_not_shifted() -> None:
    """The image itself, the input of a first layer, in a network of h-swish."""
    quantizer = DuQ(spec=QuantSpec(bits=4), lower=-0.375)
    quantizer.calibrate_(observed(-2.0, 2.0))
    assert (int(quantizer.code_low), int(quantizer.code_high)) == (-7, 7)
    assert quantizer(torch.zeros(1)) == 0
    weight = DuQ(spec=QuantSpec(bits=4, shape=(3,), signed=True), lower=-0.375)
    assert weight.offset is None
    assert weight.keeps_zero


def test_per_channel_levels_are_independent() -> None:
    weight = noise(3, 8) * torch.tensor([[0.1], [1.0], [30.0]])
    quantizer = DuQ(spec=QuantSpec(bits=8, shape=(3, 8), signed=True), granularity=PerChannel(0))
    reach = weight.abs().amax(dim=1, keepdim=True)
    quantizer.calibrate_(Observed(-reach, reach, reach))
    assert ((quantizer(weight) - weight).abs() <= reach / 127 * 0.5001).all()


@pytest.mark.parametrize("value", [1e-9, 1e-3, 0.5, 19.0, 21.0, 300.0])
def test_softplus_is_inverted(value: float) -> None:
    raw = softplus_inverse(torch.tensor(value))
    assert torch.nn.functional.softplus(raw).item() == pytest.approx(value, rel=1e-5)


def test_a_positive_lower_bound_is_refused() -> None:
    with pytest.raises(ValueError, match=r"DuQ: lower must be 0 or below, got 0\.375; it is"):
        DuQ(spec=QuantSpec(bits=4), lower=0.375)
