"""Weights that are multiplied without being a layer's are found and said."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtrain.convert.layers import find_layers


class Bare(nn.Module):
    """A layer, then one product of each kind with a bare parameter, some of them transposed or scaled before."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.kernel = nn.Parameter(torch.randn(4, 4, 3, 3))
        self.mixing = nn.Parameter(torch.randn(4, 4))
        self.head = nn.Parameter(torch.randn(5, 4))
        self.gain = nn.Parameter(torch.ones(4))
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(self.stem(x), 0.5 * self.kernel, padding=1)
        x = torch.einsum("nchw,cd->ndhw", x, self.mixing)
        x = self.norm(x.mean(dim=(2, 3)) * self.gain)
        return x @ self.head.t()


def test_each_product_with_a_bare_parameter_is_named() -> None:
    found = find_layers(Bare(), torch.zeros(1, 3, 8, 8))
    assert list(found.layers) == ["stem"]
    assert found.skipped == {
        "kernel": "a bare parameter, multiplied by conv2d",
        "mixing": "a bare parameter, multiplied by einsum",
        "head": "a bare parameter, multiplied by matmul",
    }


def test_a_nested_modules_parameter_is_named_with_its_owner() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), Bare())
    assert (
        find_layers(model, torch.zeros(1, 3, 8, 8)).skipped["1.head"] == "a bare parameter, multiplied by matmul in 1"
    )


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 4, 3), nn.Sequential(nn.Flatten(), nn.Linear(192, 4))])
def test_layers_and_gains_are_no_bare_weights(layer: nn.Module) -> None:
    assert find_layers(nn.Sequential(nn.BatchNorm2d(3), layer), torch.zeros(1, 3, 8, 8)).skipped == {}


def test_hooks_are_gone_after_a_failure() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(RuntimeError):
        find_layers(model, torch.zeros(1, 3))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
