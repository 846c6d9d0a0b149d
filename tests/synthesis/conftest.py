"""A network that knows the embedded digits, trained in a second, for images to be made from."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from qtrain.data.digits import Digits
from qtrain.spec import DataInfo


@pytest.fixture(scope="session")
def digits_info() -> DataInfo:
    """Facts of the embedded digits: (1, 8, 8), ten classes."""
    data = Digits(seed=0)
    data.setup()
    return data.info


@pytest.fixture(scope="session")
def trained_net() -> Callable[[], nn.Sequential]:
    """``trained_net()``: a fresh copy of a small network, in eval mode, that is right on nine of ten test digits."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip
    data = Digits(seed=0, crop_padding=1, flip=False)
    data.setup()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    loader = data.train_dataloader()
    for epoch in range(8):
        loader.set_epoch(epoch)
        for batch in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(batch.image), batch.target).backward()
            optimizer.step()
    net.eval().requires_grad_(False)
    hits = [(net(batch.image).argmax(1) == batch.target).float().mean() for batch in data.test_dataloader()]
    assert torch.stack(hits).mean() > 0.9

    return lambda: copy.deepcopy(net)
