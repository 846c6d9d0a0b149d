"""What tests of conversion share: models with batch norms that have seen data, without training them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

Settle = Callable[..., nn.Module]


def settled(model: nn.Module, *, channels: int = 3, size: int = 16, images: int = 128, seed: int = 0) -> nn.Module:
    """``model`` with random affine parameters in its norms, and the statistics of normally distributed images."""
    draw = torch.Generator().manual_seed(seed)
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.3, 1.5, generator=draw)
        nn.init.normal_(norm.bias, 0.0, 0.4, generator=draw)
        norm.momentum = None  # the mean over all batches
    if norms:
        model.train()
        with torch.no_grad():
            model(torch.randn(images, channels, size, size, generator=draw))
    return model.eval()


@pytest.fixture
def settle() -> Settle:
    return settled
