"""What stands in for quantizers while rounding is learned: values by hand, and everything back in its place."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from qtrain.nn import QuantLinear
from qtrain.ptq.rounding.base import candidates
from qtrain.ptq.rounding.soft_rounding import (
    Dropped,
    SoftWeight,
    annealed,
    dropping,
    input_parameters,
    inverse_rectified_sigmoid,
    mixed,
    rectified_sigmoid,
    standing_in,
    undecided,
)
from qtrain.quantizers.binary.xnor import XNOR
from qtrain.quantizers.uniform.affine import Affine
from qtrain.quantizers.uniform.lsq import LSQ
from qtrain.spec import QuantSpec


def layer(*, bits: int = 2) -> QuantLinear:
    """Weights of which values -2, -1, 0, 1 clip the last two; an input quantizer that learns."""
    made = QuantLinear(source=nn.Linear(4, 1))
    made.weight.data = torch.tensor([[0.25, -0.6, 1.4, 3.0]])
    made.weight_quantizer = Affine(spec=QuantSpec(bits=bits, shape=(1, 4), signed=True))
    made.weight_quantizer.initialized.fill_(True)
    made.input_quantizer = LSQ(spec=QuantSpec(bits=bits))
    return made


def test_rectified_sigmoid_and_its_inverse() -> None:
    """``sigmoid(V) 1.2 - 0.1``, cut: 0.5 at 0, 0 and 1 beyond ``|V| = log 11``."""
    by_hand = [0.0, 0.5, 1 / (1 + math.exp(-1)) * 1.2 - 0.1, 1.0]
    torch.testing.assert_close(rectified_sigmoid(torch.tensor([-2.4, 0.0, 1.0, 2.4])), torch.tensor(by_hand))
    assert rectified_sigmoid(torch.tensor(2.39)) < 1
    shares = torch.linspace(0, 1, 101)
    torch.testing.assert_close(rectified_sigmoid(inverse_rectified_sigmoid(shares)), shares, atol=1e-6, rtol=0)


def test_undecided_matches_equation_24() -> None:
    shares = torch.tensor([0.0, 0.25, 0.5, 1.0])
    torch.testing.assert_close(undecided(shares, 2.0), torch.tensor([0.0, 0.75, 1.0, 0.0]))
    torch.testing.assert_close(undecided(shares, 20.0), torch.tensor([0.0, 1 - 0.5**20, 1.0, 0.0]))


def test_beta_is_none_in_warmup_and_then_falls() -> None:
    values = [annealed(progress, start=20.0, end=2.0, warmup=0.2) for progress in (0.0, 0.19, 0.2, 0.6, 1.0)]
    assert values[:2] == [None, None]
    assert values[2:] == pytest.approx([20.0, 11.0, 2.0])


def test_soft_weight_starts_at_the_weight_and_settles_on_a_neighbor() -> None:
    made = layer()
    soft = SoftWeight(candidates(made))
    torch.testing.assert_close(soft(made.weight), torch.tensor([[0.25, -0.6, 1.0, 1.0]]))
    assert soft.settled().tolist() == [[0.0, -1.0, 1.0, 1.0]], "nearest, where nothing was learned"
    assert soft.share().tolist() == pytest.approx([0.25, 0.4]), "of weights with a choice only"
    soft.variable.data = torch.tensor([[3.0, 1.0, -3.0, -3.0]])
    assert soft.settled().tolist() == [[1.0, 0.0, 1.0, 1.0]]
    soft(made.weight).sum().backward()
    assert soft.variable.grad is not None
    assert soft.variable.grad[0, 1] > 0
    assert not soft.variable.grad[0, 2:].any()


def test_mixed_takes_exact_values_with_the_given_probability() -> None:
    exact, quantized = torch.zeros(100, 200), torch.ones(100, 200)
    for drop in (0.0, 0.2, 0.5):
        taken = mixed(exact, quantized, drop=drop, seed=3)
        assert set(taken.unique().tolist()) <= {0.0, 1.0}
        assert 1 - taken.mean() == pytest.approx(drop, abs=0.015)
        assert 1 - taken[:, 0].mean() == pytest.approx(drop, abs=0.15), "for each value, not for each row"
    assert torch.equal(mixed(exact, quantized, drop=0.5, seed=3), mixed(exact, quantized, drop=0.5, seed=3))
    assert not torch.equal(mixed(exact, quantized, drop=0.5, seed=3), mixed(exact, quantized, drop=0.5, seed=4))


def test_quantizers_are_restored_also_after_an_error() -> None:
    made = layer()
    before = made.weight_quantizer, made.input_quantizer
    chosen = candidates(made)
    with pytest.raises(KeyError), standing_in([chosen], [SoftWeight(chosen)]), dropping(made, 0.5) as dropped:
        assert isinstance(made.weight_quantizer, SoftWeight)
        assert dropped == [made.input_quantizer]
        raise KeyError
    assert (made.weight_quantizer, made.input_quantizer) == before


def test_dropping_replaces_input_quantizers_except_those_that_scale_the_output() -> None:
    made = layer()
    x = torch.full((50, 4), 0.3)
    with dropping(made, 0.5) as (dropped,):
        dropped.seed = 1
        values = dropped(x)
        assert set(values.unique().tolist()) == {0.0, x[0, 0].item()}
    with dropping(made, 0.0) as none:
        assert none == []
        assert not isinstance(made.input_quantizer, Dropped)
    made.input_quantizer = XNOR(spec=QuantSpec(bits=1))
    with dropping(made, 0.5) as none:
        assert none == []


def test_input_parameters_are_those_of_input_quantizers() -> None:
    made = layer()
    assert made.input_quantizer is not None
    assert [id(p) for p in input_parameters(made)] == [id(made.input_quantizer.scale)]
    made.input_quantizer.requires_grad_(False)
    assert input_parameters(made) == []
    made.input_quantizer = Affine(spec=QuantSpec(bits=2))
    assert input_parameters(made) == []


def test_input_parameters_are_listed_once_and_without_those_of_other_parts() -> None:
    part = nn.Sequential(layer(), layer(), layer())
    first, _, third = (one.input_quantizer for one in part)
    part[1].input_quantizer = first  # two readers of one tensor
    assert [id(p) for p in input_parameters(part)] == [id(first.scale), id(third.scale)]
    assert [id(p) for p in input_parameters(part, besides=[first])] == [id(third.scale)], "read by another part too"
    assert [id(p) for p in input_parameters(part, besides=[part[2]])] == [id(first.scale)]
