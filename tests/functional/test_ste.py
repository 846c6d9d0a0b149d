"""Straight-through estimators: an exact forward, and the gradient that the paper defines."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from qtrain.functional.ste import round_ste, scale_gradient

numbers = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=8)


@given(numbers)
def test_round_ste_rounds_forward_and_passes_gradient(values: list[float]) -> None:
    x = torch.tensor(values, requires_grad=True)
    y = round_ste(x)
    assert torch.equal(y, x.detach().round())
    upstream = torch.arange(1.0, len(values) + 1)
    assert torch.equal(torch.autograd.grad(y, x, upstream)[0], upstream)


def test_ties_go_to_even() -> None:
    assert round_ste(torch.tensor([-1.5, -0.5, 0.5, 1.5, 2.5])).tolist() == [-2.0, -0.0, 0.0, 2.0, 2.0]


@given(numbers, st.floats(0, 100, width=32))
def test_scaling_the_gradient_leaves_the_value(values: list[float], factor: float) -> None:
    x = torch.tensor(values, requires_grad=True)
    y = scale_gradient(x, torch.tensor(factor))
    assert torch.equal(y, x)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.full_like(x, factor))


def test_the_factor_itself_gets_no_gradient() -> None:
    x, factor = torch.ones(3, requires_grad=True), torch.tensor(0.5, requires_grad=True)
    scale_gradient(x, factor).sum().backward()
    assert factor.grad is None
