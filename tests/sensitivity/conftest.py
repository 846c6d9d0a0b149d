"""A small network with layers of every kind, as a bank of quantizers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtrain.convert.bank import QuantizerBank, Widths, make_bank
from qtrain.convert.layers import find_layers
from qtrain.convert.plan import LayerPlan
from qtrain.observers.min_max import MinMax
from qtrain.observers.squared_error import SquaredError
from qtrain.quantizers.uniform.lsq import LSQ
from qtrain.spec import Batch, PerChannel


class Net(nn.Module):
    """A convolution, a depthwise one that is called twice, tokens, two linear layers with one weight, and a head.

    ``place`` reads a constant, so its output is the same for all images.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, stride=2)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.place = nn.Linear(2, 6)
        self.mix, self.again = nn.Linear(6, 6), nn.Linear(6, 6)
        self.again.weight = self.mix.weight
        self.head = nn.Linear(6, 4)
        self.register_buffer("grid", torch.linspace(-1, 1, 32).reshape(16, 2))
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        x = self.depthwise(torch.tanh(self.depthwise(x)))
        tokens = x.flatten(2).transpose(1, 2) + self.place(self.grid)
        tokens = tokens + self.again(F.gelu(self.mix(tokens)))
        return self.head(tokens.mean(1)) * 4


RECIPE = LayerPlan(
    weight=partial(LSQ, granularity=PerChannel()), input=LSQ, weight_observer=MinMax, input_observer=SquaredError
)

MakeBank = Callable[..., tuple[QuantizerBank, list[Batch]]]


WIDTHS = Widths((3, 6), (3, 6))


def _bank(
    model: nn.Module | None = None,
    widths: Widths = WIDTHS,
    images: int = 12,
    size: int = 8,
    dtype: torch.dtype = torch.float32,
    recipe: LayerPlan = RECIPE,
) -> tuple[QuantizerBank, list[Batch]]:
    torch.manual_seed(0)
    model = (Net() if model is None else model).eval().to(dtype)
    image = torch.randn(images, 3, size, size, dtype=dtype)
    target = torch.randint(0, 4, (images,))
    batches = [
        Batch(image[part], target[part], torch.arange(images)[part])
        for part in (slice(0, images // 3), slice(images // 3, images))
    ]
    found = find_layers(model, image[:2])
    return make_bank(model, found, recipe, widths, [b.image for b in batches]), batches


@pytest.fixture
def small_bank() -> MakeBank:
    """Makes a bank of the small network, and 12 images in batches of 4 and 8."""
    return _bank


@pytest.fixture
def whole() -> Callable[[list[Batch]], Any]:
    """All images of some batches, and all targets."""
    return lambda batches: (torch.cat([b.image for b in batches]), torch.cat([b.target for b in batches]))
