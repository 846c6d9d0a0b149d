"""Quantized weights that several batches share: gradients are those of quantizing for each batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import qtrain
from qtrain.nn.held_weights import HeldWeights
from tests.helpers.many_bits import images, many_bits


def transposed_and_shared() -> nn.Module:
    """A transposed convolution, and one linear layer that is called twice."""
    torch.manual_seed(0)
    line = nn.Linear(8, 8)
    network = nn.Sequential(nn.ConvTranspose2d(1, 2, 3), nn.ReLU(), nn.AdaptiveAvgPool2d((1, 8)), line, nn.ReLU(), line)
    return qtrain.quantize(network, images(), ends=None)


def folded() -> nn.Module:
    """Weights that follow their batch norm are quantized for each batch."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    return qtrain.quantize(network, images(), ends=None, options=["quantize.fold=training"])


def all_widths(student: nn.Module, x: Tensor) -> Tensor:
    students = getattr(student, "students", {None: student})
    return torch.stack([one(x).square().sum() for one in students.values()]).sum()


@pytest.mark.parametrize("make", [many_bits, transposed_and_shared, folded])
def test_gradients_are_those_of_quantizing_for_each_batch(make: Callable[[], nn.Module]) -> None:
    found: list[dict[str, Tensor]] = []
    for hold in (False, True):
        student = make().double().train()
        held = HeldWeights(student)
        for number in range(6):  # two steps
            if number % 3 == 0:
                student.zero_grad()
            batch = (images(4) + number / 10).double()
            if hold:
                with held.batch(last=number % 3 == 2):
                    loss = all_widths(student, batch)
            else:
                loss = all_widths(student, batch)
            loss.backward()
        found.append({name: p.grad for name, p in student.named_parameters() if p.grad is not None})
    plain, shared = found
    assert plain.keys() == shared.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(shared[name], gradient, msg=name, rtol=1e-4, atol=1e-6)
