"""A small student of many bits, and images for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import qtrain
from qtrain.nn.many_bits import ManyBits

WIDTHS = (8, 4, 2)
CLASSES = 3


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Flatten(), nn.Linear(6 * 16, CLASSES),
    )  # fmt: skip


def images(count: int = 8) -> Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(5))


def labels(count: int = 8) -> Tensor:
    return torch.arange(count) % CLASSES


def many_bits(*options: str) -> ManyBits:
    """Converted and calibrated, with batch norms that differ between the widths, as after training."""
    torch.manual_seed(3)
    given = ["granularity@quantize.weight.granularity=channel", *options]
    student = qtrain.quantize(network(), images(), widths=WIDTHS, options=given)
    assert isinstance(student, ManyBits)
    for number, one in enumerate(student.students.values()):
        for module in one.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                module.running_mean.add_(0.05 * (number + 1))
                module.weight.data.mul_(1 + 0.1 * number)
    return student
