"""Stochastic rounding: the mean over draws is the value, each draw a neighbor, and eval the nearest code."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qtrain.functional.stochastic import stochastic_round
from qtrain.quantizers.uniform.stochastic_rounding import StochasticRounding
from qtrain.spec import QuantSpec


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quantizer(scale: float, bits: int = 4) -> StochasticRounding:
    made = StochasticRounding(spec=QuantSpec(bits=bits, signed=True))
    made.scale.fill_(scale)
    return made.train()


def draws(made: StochasticRounding, x: Tensor, count: int) -> Tensor:
    """(count, *x.shape), one for each of ``count`` steps."""
    results = []
    for step in range(count):
        made.begin_step_(progress=0.0, key=7919 * step + 1)
        results.append(made(x))
    return torch.stack(results)


def test_the_mean_over_draws_converges_to_the_value() -> None:
    """A draw's variance is f (1 - f) s^2 with f the fraction of a step: five standard errors, at two sample sizes."""
    x = torch.tensor([-0.61, -0.5, -0.3, -0.01, 0.0, 0.07, 0.125, 0.499, 0.7])
    made = quantizer(0.1)
    fraction = (x / 0.1) - (x / 0.1).floor()
    all_draws = draws(made, x, 6400).double()
    for count in (100, 6400):
        error = 0.1 * (fraction * (1 - fraction) / count).sqrt()
        assert ((all_draws[:count].mean(dim=0) - x).abs() <= 5 * error + 1e-6).all()
    assert (all_draws.mean(dim=0) - x).abs().max() < 0.005
    assert (made.eval()(x) - x).abs().max() > 0.02, "rounding to the nearest has a bias that no mean removes"


def test_a_draw_is_one_of_the_two_neighbors_with_the_papers_probability() -> None:
    x = torch.full((20000,), 0.23)
    result = quantizer(0.1)(x)
    assert sorted({round(v, 5) for v in result.tolist()}) == [0.2, 0.3]
    share = (result > 0.25).double().mean().item()
    assert share == pytest.approx(0.3, abs=5 * math.sqrt(0.3 * 0.7 / 20000))


@pytest.mark.parametrize("bits", [2, 4, 16])
def test_codes_stay_in_range_at_the_range_ends(bits: int) -> None:
    """floor(x + u) would leave it: high + 0.9999999 is high + 1 in float32."""
    high = 2 ** (bits - 1) - 1
    x = torch.tensor([-high - 9.0, -high - 1.0, float(high), high + 0.7]).repeat(4000)
    result = quantizer(1.0, bits)(x)
    assert result.unique().tolist() == [-high - 1.0, float(high)]


@given(st.floats(-1e6, 1e6, width=32), st.integers(0, 2**24 - 1))
def test_rounding_is_to_a_neighbor_and_keeps_whole_numbers(value: float, numerator: int) -> None:
    x, uniform = torch.tensor(value), torch.tensor(numerator * 2.0**-24)
    result = stochastic_round(x, uniform)
    assert result in (x.floor(), x.ceil())


def test_eval_rounds_to_the_nearest_as_torch_does() -> None:
    x = noise(3000)
    made = quantizer(0.125).eval()
    assert torch.equal(made(x), torch.fake_quantize_per_tensor_affine(x, 0.125, 0, -8, 7))


def test_draws_follow_the_key_alone() -> None:
    x, made = noise(4, 50), quantizer(0.3)
    first = draws(made, x, 3)
    torch.manual_seed(5)
    assert torch.equal(draws(made, x, 3), first)
    assert not torch.equal(first[0], first[1])
    assert "key" not in made.state_dict(), "it is set before each step"


def test_the_gradient_passes_inside_the_range() -> None:
    x = noise(500).requires_grad_()
    (grad,) = torch.autograd.grad(quantizer(0.1)(x).sum(), x)
    torch.testing.assert_close(grad, ((x >= -0.8) & (x <= 0.7)).float(), rtol=1e-6, atol=0)
