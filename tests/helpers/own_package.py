"""A package as a user has one, outside of the checkout: networks and data that know nothing of qtrain."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NETWORKS = '''
"""Networks: a class without arguments that calls view, one with options, and a function."""
import torch
from torch import nn


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6 * 64, 10)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x)))
        return self.fc(x.view(x.size(0), -1))


class Wide(nn.Module):
    def __init__(self, num_classes, in_channels, width: int = 4):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, width, 3, padding=1)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.fc(torch.relu(self.conv(x)).mean((2, 3)))


def build(width: int = 4, **rest):
    assert not rest, rest
    return Wide(10, 1, width)


def needs(depth):
    return Plain()


def fails():
    return Wide(10, chanels=1)


def nothing():
    return None


def no_parameters():
    return nn.Flatten()


def five_classes():
    return Wide(5, 1)


class Pair(Plain):
    def forward(self, x):
        return super().forward(x), None


NUMBER = 5
'''

DATA = '''
"""Images of 8x8 pixels, by functions that return (training, test)."""
import random

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, TensorDataset, random_split

NUMBERS = np.random.default_rng(0)
PIXELS = NUMBERS.integers(0, 256, (96, 8, 8), dtype=np.uint8)
LABELS = np.arange(96) % 10


class Pictures(Dataset):
    """PIL images with names of classes."""

    classes = [f"digit {i}" for i in range(10)]

    def __init__(self, start=0, stop=96):
        self.start, self.stop = start, stop

    def __len__(self):
        return self.stop - self.start

    def __getitem__(self, number):
        number += self.start
        return Image.fromarray(PIXELS[number]), int(LABELS[number])


def pictures():
    return Pictures(0, 64), Pictures(64, 96)


def split(share: float = 0.75):
    whole = TensorDataset(torch.from_numpy(PIXELS)[:, None], torch.from_numpy(LABELS))
    return random_split(whole, [share, 1 - share])


def floats():
    images = torch.from_numpy(PIXELS)[:, None].float() / 128 - 1
    items = list(zip(images, LABELS.tolist()))
    return items[:64], items[64:]


class Noisy(Pictures):
    """Draws random numbers of all three generators for each item."""

    def __getitem__(self, number):
        shift = random.randrange(4) + int(np.random.randint(4)) + int(torch.randint(4, (1,)))
        image, label = super().__getitem__(number)
        return np.roll(np.asarray(image), shift), label


def noisy():
    return Noisy(0, 64), Noisy(64, 96)
'''


@contextmanager
def own_package(folder: Path, name: str, **modules: str) -> Iterator[str]:
    """A package ``name`` in ``folder``, which is on the path meanwhile; ``modules`` are texts of further modules."""
    package = folder / name
    package.mkdir()
    texts = {"__init__": f"from {name}.networks import build\n", "networks": NETWORKS, "images": DATA, **modules}
    for module, text in texts.items():
        (package / f"{module}.py").write_text(text, encoding="utf-8")
    sys.path.insert(0, str(folder))
    try:
        yield name
    finally:
        sys.path.remove(str(folder))
        for module in [known for known in sys.modules if known.split(".")[0] == name]:
            del sys.modules[module]
