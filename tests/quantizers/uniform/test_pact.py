"""PACT: equation 1 to 3 of its paper, and torch's own operator for what comes out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qtrain.functional.ste import clip_ste
from qtrain.quantizers.uniform.pact import PACT
from qtrain.spec import Observed, QuantSpec


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pact(level: float, *, bits: int = 4, low: float = 0.0, decay: float = 0.0) -> PACT:
    quantizer = PACT(spec=QuantSpec(bits=bits, signed=low < 0), init=level, decay=decay)
    quantizer.calibrate_(Observed(torch.tensor(low), torch.tensor(1.0), torch.tensor(0.5)))
    return quantizer


@pytest.mark.parametrize("level", [0.7, 2.0])
def test_the_clip_is_the_papers_formula_of_absolute_values(level: float) -> None:
    x = torch.cat([noise(1000) * 2, torch.tensor([0.0, level])])
    exact = x.double()
    expected = 0.5 * (exact.abs() - (exact - level).abs() + level)
    ours = clip_ste(x, torch.tensor(level), torch.tensor(0.0))
    torch.testing.assert_close(ours.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_values_are_evenly_spaced_from_zero_to_the_level(bits: int) -> None:
    """Equation 2 in float64; where rounding is not at a tie."""
    x = noise(2000) * 2
    expected = ((x.double().clamp(0, 1.3) * (2**bits - 1) / 1.3).round() * 1.3 / (2**bits - 1)).float()
    torch.testing.assert_close(pact(1.3, bits=bits)(x), expected, rtol=1e-6, atol=1e-6)


def test_values_agree_with_torchs_operator() -> None:
    x = noise(2000, seed=1) * 3
    ours = pact(15 * 0.125)(x)
    assert torch.equal(ours, torch.fake_quantize_per_tensor_affine(x, 0.125, 0, 0, 15))
    signed = pact(7 * 0.125, low=-1.0)(x)
    assert torch.equal(signed, torch.fake_quantize_per_tensor_affine(x, 0.125, 0, -7, 7))


def test_gradients_match_pact_and_differ_from_lsq() -> None:
    """Equation 3: 1 for the level where x >= a, 0 elsewhere, however far rounding went; for x the other way round."""
    quantizer = pact(1.0)
    x = torch.tensor([-1.0, 0.0, 0.41, 0.9999, 1.0, 5.0], requires_grad=True)
    upstream = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    for_x, for_level = torch.autograd.grad(quantizer(x), [x, quantizer.level], upstream)
    assert for_x.tolist() == [0.0, 2.0, 4.0, 8.0, 0.0, 0.0]
    assert for_level.item() == 48.0


def test_the_signed_clip_is_symmetric() -> None:
    quantizer = pact(1.0, low=-1.0)
    assert (int(quantizer.code_low), int(quantizer.code_high)) == (-7, 7)
    x = torch.tensor([-5.0, -0.6, 0.0, 0.3, 5.0], requires_grad=True)
    y = quantizer(x)
    assert y[[0, 2, 4]].tolist() == [-1.0, 0.0, 1.0]
    upstream = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    for_x, for_level = torch.autograd.grad(y, [x, quantizer.level], upstream)
    assert for_x.tolist() == [0.0, 2.0, 4.0, 8.0, 0.0]
    assert for_level.item() == 16.0 - 1.0


@pytest.mark.parametrize("floor", [0.0, -1.0])
def test_the_levels_gradient_is_the_difference_quotient_of_the_clip(floor: float) -> None:
    x, upstream = noise(500) * 2, noise(500, seed=1)
    x = x[((x.abs() - 1.25).abs() > 0.01)]
    upstream = upstream[: len(x)]

    def total(level: float) -> Tensor:
        return (clip_ste(x, torch.tensor(level), torch.tensor(floor)).double() * upstream).sum()

    level = torch.tensor(1.25, requires_grad=True)
    (grad,) = torch.autograd.grad(clip_ste(x, level, torch.tensor(floor)), level, upstream)
    h = 2.0**-8
    torch.testing.assert_close(grad.double(), (total(1.25 + h) - total(1.25 - h)) / (2 * h), rtol=1e-4, atol=1e-4)


def test_the_level_decays_in_training_only() -> None:
    x = torch.tensor([0.1, 3.0])
    quantizer = pact(2.0, decay=0.01)
    for training, expected in ((True, 1.0 + 0.01 * 2.0), (False, 1.0)):
        (grad,) = torch.autograd.grad(quantizer.train(training)(x).sum(), quantizer.level)
        assert grad.item() == pytest.approx(expected, rel=1e-6)
    assert torch.equal(quantizer.train()(x), quantizer.eval()(x)), "the regularizer is in the gradient alone"


def test_level_starts_at_the_observed_range_or_init() -> None:
    for low, high, expected in ((0.0, 6.0, 6.0), (-7.0, 6.0, 7.0), (0.0, 0.0, 15.0)):
        quantizer = PACT(spec=QuantSpec(bits=4))
        quantizer.calibrate_(Observed(torch.tensor(low), torch.tensor(high), torch.tensor(1.0)))
        assert quantizer.level.item() == pytest.approx(expected)
    assert pact(10.0).level.item() == 10.0


def test_level_below_zero_stays_usable() -> None:
    quantizer = pact(1.0)
    with torch.no_grad():
        quantizer.level.fill_(-1.0)
    x = noise(20)
    assert torch.equal(quantizer(x), pact(1.0)(x))


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"PACT: decay must be at least 0, got -1\.0; 0 leaves"):
        PACT(spec=QuantSpec(bits=4), decay=-1.0)
    with pytest.raises(ValueError, match=r"PACT: init must be above 0, got 0\.0; give null"):
        PACT(spec=QuantSpec(bits=4), init=0.0)
    with pytest.raises(ValueError, match="PACT: quantizes inputs only, not a weight; name another"):
        PACT(spec=QuantSpec(bits=4, shape=(2, 2), signed=True))
