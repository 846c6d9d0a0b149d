"""Clamping to tensors is torch's own, whatever the bounds' shape and wherever it is computed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qtrain.functional.clamping import clamp_, clamped
from qtrain.functional.ste import clamp_to, fake_quantize_ste

BOUNDS = [
    (torch.tensor(-1.0), torch.tensor(2.0)),
    (torch.tensor([[-1.0], [0.0], [0.5]]), torch.tensor([[1.0], [0.0], [3.0]])),
    (torch.tensor(2.0), torch.tensor(-1.0)),  # the upper one wins, as in torch
]


def values() -> Tensor:
    x = 3 * torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    x[0, :4] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])
    return x


@pytest.mark.parametrize(("low", "high"), BOUNDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_torchs(low: Tensor, high: Tensor, dtype: torch.dtype) -> None:
    x = values().to(dtype)
    low, high = low.to(dtype), high.to(dtype)
    expected, before = x.clamp(low, high), x.clone()
    torch.testing.assert_close(clamped(x, low, high), expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(x, before, rtol=0, atol=0, equal_nan=True)
    found = clamp_(x, low, high)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert found.data_ptr() == x.data_ptr()


def test_autograd_goes_through_copies() -> None:
    x = torch.tensor([-3.0, 0.25, 3.0], requires_grad=True)
    for clamp in (clamped, clamp_):
        (gradient,) = torch.autograd.grad(clamp(x, torch.tensor(-1.0), torch.tensor(2.0)).sum(), x)
        assert gradient.tolist() == [0.0, 1.0, 0.0]
    assert x.tolist() == [-3.0, 0.25, 3.0]
    high = torch.tensor(2.0, requires_grad=True)
    for clamp in (clamped, clamp_):
        (gradient,) = torch.autograd.grad(clamp(torch.tensor([-3.0, 0.25, 3.0]), torch.tensor(-1.0), high).sum(), high)
        assert gradient == 1.0


def test_second_derivatives_pass_through_quantizers() -> None:
    x = torch.tensor([-3.0, 0.25, 3.0], requires_grad=True)
    low, high, scale = torch.tensor(-1.0), torch.tensor(2.0), torch.tensor(1.0, requires_grad=True)
    for result in (clamp_to(x, low, high), fake_quantize_ste(x, scale, low, high)):
        (first,) = torch.autograd.grad((result**2).sum() / 2, x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x)
        assert second.tolist() == [0.0, 1.0, 0.0]


@pytest.mark.slow
def test_compiled_code_gives_the_same() -> None:
    x, (low, high) = values(), BOUNDS[0]
    compiled = torch.compile(lambda t: clamp_(t / 2, low, high), fullgraph=True)
    torch.testing.assert_close(compiled(x), (x / 2).clamp(low, high), rtol=0, atol=0, equal_nan=True)
