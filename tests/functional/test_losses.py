"""Losses against their formulas in float64, and the properties that make them what they are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qtrain.functional.losses import hard_loss, hint_loss, soft_target_loss


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 sum p log(p / q), mean over the batch, in float64 from plain exponentials."""
    p = (teacher.double() / temperature).exp()
    q = (student.double() / temperature).exp()
    p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
    return temperature**2 * (p * (p / q).log()).sum(1).mean()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_soft_targets_are_the_divergence_times_temperature_squared(temperature: float) -> None:
    student, teacher = noise(16, 10) * 3, noise(16, 10, seed=1) * 3
    ours = soft_target_loss(student, teacher, torch.tensor(temperature))
    torch.testing.assert_close(ours.double(), kl(student, teacher, temperature), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours, soft_target_loss(student, teacher, temperature))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_gradient_is_temperature_times_the_difference_of_probabilities(temperature: float) -> None:
    """Hinton 2015, eq. 2: dC/dz = (q - p) / T for the bare cross-entropy; T^2 times that here."""
    student, teacher = noise(8, 10).requires_grad_(), noise(8, 10, seed=1)
    (grad,) = torch.autograd.grad(soft_target_loss(student, teacher, temperature), student)
    q, p = ((z.detach().double() / temperature).softmax(1) for z in (student, teacher))
    torch.testing.assert_close(grad.double(), temperature * (q - p) / 8, rtol=1e-4, atol=1e-6)


def test_at_high_temperature_the_gradient_does_not_depend_on_it() -> None:
    """Eq. 4: towards (z - v) / K for logits of zero mean, whatever T, which is what the factor T^2 is for."""
    student, teacher = noise(8, 10), noise(8, 10, seed=1)
    student, teacher = (z - z.mean(1, keepdim=True) for z in (student, teacher))
    leaf = student.clone().requires_grad_()
    grads = [torch.autograd.grad(soft_target_loss(leaf, teacher, t), leaf)[0] for t in (50.0, 500.0)]
    expected = (student - teacher) / 10 / 8
    torch.testing.assert_close(grads[0], expected, rtol=0.1, atol=1e-3)
    torch.testing.assert_close(grads[1], expected, rtol=0.02, atol=2e-4)


@given(st.integers(0, 1000), st.floats(0.5, 30))
def test_soft_targets_are_not_negative_and_zero_only_in_agreement(seed: int, temperature: float) -> None:
    student, teacher = noise(4, 5, seed=seed), noise(4, 5, seed=seed + 1)
    assert soft_target_loss(student, teacher, temperature) > 0
    assert soft_target_loss(teacher, teacher, temperature).abs() < 1e-9
    shifted = soft_target_loss(teacher + 3, teacher, temperature)  # a constant changes no probability
    assert shifted.abs() < 1e-4 * temperature**2


def test_hard_loss_takes_indices_and_probabilities() -> None:
    logits, target = noise(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    expected = -logits.double().log_softmax(1)[torch.arange(6), target].mean()
    torch.testing.assert_close(hard_loss(logits, target).double(), expected, rtol=1e-5, atol=1e-6)
    one_hot = torch.nn.functional.one_hot(target, 4).float()
    torch.testing.assert_close(hard_loss(logits, one_hot), hard_loss(logits, target))
    smoothed = 0.8 * one_hot + 0.2 / 4
    torch.testing.assert_close(hard_loss(logits, target, 0.2), hard_loss(logits, smoothed))


def test_hint_is_half_the_mean_squared_error() -> None:
    guided, hint = noise(2, 3, 4, 4), noise(2, 3, 4, 4, seed=1)
    expected = 0.5 * (guided.double() - hint.double()).square().mean()
    torch.testing.assert_close(hint_loss(guided, hint).double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("loss", [lambda x: hint_loss(x, x + 1), lambda x: soft_target_loss(x, x + 1, 2.0)])
def test_half_precision_is_summed_in_float32(loss: object) -> None:
    assert loss(noise(4, 5).bfloat16()).dtype == torch.float32  # type: ignore[operator]
