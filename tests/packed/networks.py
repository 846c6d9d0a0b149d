"""Small networks that students' files name as their builders."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Kinds(nn.Module):
    """Every kind of layer once: plain, depthwise, transposed, linear, embedding; x (N, 3, 8, 8) -> (N, classes)."""

    def __init__(self, *, width: int = 8, classes: int = 5, gammas: Sequence[float] = ()) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        if gammas:
            self.norm.weight.data = torch.tensor(gammas)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.up = nn.ConvTranspose2d(width, width, 2, stride=2, groups=2)
        self.places = nn.Embedding(16, width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        x = torch.relu(self.up(self.depthwise(x)))
        x = x + self.places(torch.arange(16, device=x.device)).t()[None, :, :, None].to(x.dtype)
        logits: Tensor = self.head(x.mean(dim=(2, 3)))
        return logits


class Tied(nn.Module):
    """Two linear layers that share one weight, and a parameter that is used as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 4, stride=4)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.gain = nn.Parameter(torch.ones(6))
        self.register_buffer("order", torch.arange(6).flip(0))

    def forward(self, x: Tensor) -> Tensor:
        order = self.get_buffer("order")
        x = self.stem(x).mean(dim=(2, 3))[:, order] * self.gain
        logits: Tensor = self.second(torch.relu(self.first(x)))
        return logits


class TiedTable(nn.Module):
    """A linear head whose weight is the table of an embedding, (classes, width)."""

    def __init__(self, *, classes: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.table = nn.Embedding(classes, 8)
        self.head = nn.Linear(8, classes)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x)).mean(dim=(2, 3)) + self.table(torch.arange(1, device=x.device))
        logits: Tensor = self.head(x)
        return logits


class TiedKernels(nn.Module):
    """A convolution and a transposed one back that share their kernel, whose output channels are the other's inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 1)
        self.down, self.up = nn.Conv2d(6, 6, 3, stride=2), nn.ConvTranspose2d(6, 6, 3, stride=2)
        self.up.weight = self.down.weight

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.up(torch.relu(self.down(self.stem(x)))).mean(dim=(2, 3))
        return logits


class SameStorage(nn.Module):
    """Two parameters that are different objects over the same numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = nn.Parameter(self.first.weight.data)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.second(torch.relu(self.first(x.mean(dim=(2, 3)))))
        return logits


class TiedConvolutions(nn.Module):
    """Two convolutions that share one kernel, without biases; x (N, 8, H, W) -> (N, 8, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(2))
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.second(torch.relu(self.first(x)))
        return logits
