"""Images that a model is asked about lie in memory as its weights do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qtrain.models.memory_format import to_channels_last_
from qtrain.spec import DataInfo
from qtrain.synthesis.base import Synthesis
from qtrain.synthesis.bn_statistics import BNStatistics
from qtrain.synthesis.gdfq import GDFQ
from qtrain.synthesis.generator_synthesis import GeneratorSynthesis
from qtrain.synthesis.intraq import IntraQ

CPU = torch.device("cpu")
SEEN: list[bool] = []
"""Whether each batch of images that a network got was in channels_last; methods ask copies of it."""


class Net(nn.Module):
    """Notes the format of its images; with ``views`` it needs contiguous ones."""

    def __init__(self, channels: int, *, views: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(256, 3)
        self.views = views
        nn.init.constant_(self.norm.running_mean, 0.1)  # as after some training

    def forward(self, x: Tensor) -> Tensor:
        SEEN.append(x.is_contiguous(memory_format=torch.channels_last))
        x = self.norm(self.second(self.conv(x)))
        return self.fc(x.view(len(x), -1) if self.views else x.flatten(1))


def methods() -> list[Synthesis]:
    return [
        BNStatistics(batch_size=4, steps=1, shift=1),
        IntraQ(batch_size=4, steps=1, shift=1, images_per_class=2),
        GeneratorSynthesis(conditioning=GDFQ(), batch_size=4, steps=1, width=4, snapshots=1),
    ]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("number", range(3))
def test_network_that_calls_view_is_asked_about_contiguous_images(number: int, channels: int, tmp_path: Path) -> None:
    info = DataInfo("x", 3, channels, 8, (0.5,) * channels, (0.3,) * channels, 0, 0, 0, "resident")
    net = Net(channels, views=True).eval().requires_grad_(False)
    assert not to_channels_last_(net, torch.zeros(2, channels, 8, 8))
    method = methods()[number]
    SEEN.clear()
    method.learn([net], info, seed=0, folder=tmp_path, device=CPU)
    assert method.make([net], info, number=0, seed=0, device=CPU).images.shape == (4, 8, 8, channels)
    assert channels == 1 or not any(SEEN), "gray images are in both formats"


@pytest.mark.parametrize("number", range(3))
def test_network_in_channels_last_is_asked_about_such_images(number: int, tmp_path: Path) -> None:
    info = DataInfo("x", 3, 3, 8, (0.5,) * 3, (0.3,) * 3, 0, 0, 0, "resident")
    net = Net(3, views=False).eval().requires_grad_(False)
    assert to_channels_last_(net, torch.zeros(2, 3, 8, 8))
    method = methods()[number]
    SEEN.clear()
    method.learn([net], info, seed=0, folder=tmp_path, device=CPU)
    method.make([net], info, number=0, seed=0, device=CPU)
    assert any(SEEN), "augmentation of a step may change the format, and the images of a batch have it"
