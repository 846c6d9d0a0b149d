"""The network that makes images from codes."""

from typing import NamedTuple, final

import torch
from torch import Tensor, nn

from qtrain.spec import DataInfo
from qtrain.synthesis.base import pixel_range

LARGEST_START = 8
WIDEST = 512


class GeneratorShape(NamedTuple):
    """Side of the first map in pixels, and the channels after each doubling of it."""

    start: int
    channels: tuple[int, ...]


def shape_of(image_size: int, width: int) -> GeneratorShape:
    """The shape of a generator of images with ``image_size`` pixels on a side.

    It has the least number of doublings, at least two, for which the first map is at most 8 pixels wide. There are
    ``width`` channels at full size and twice as many before each doubling, at most 512. If doublings do not lead to
    exactly ``image_size``, they lead to a larger size.

    >>> shape_of(32, 64), shape_of(28, 64)
    (GeneratorShape(start=8, channels=(128, 64)), GeneratorShape(start=7, channels=(128, 64)))
    >>> shape_of(224, 64)
    GeneratorShape(start=7, channels=(512, 512, 256, 128, 64))
    """
    doublings = 2
    while -(-image_size // 2**doublings) > LARGEST_START:
        doublings += 1
    channels = tuple(min(width * 2**i, max(WIDEST, width)) for i in reversed(range(doublings)))
    return GeneratorShape(-(-image_size // 2**doublings), channels)


@final
class Generator(nn.Module):
    """Codes (N, ``latent``) to normalized images (N, C, H, W) whose pixels lie between black and white.

    The architecture is the one that GDFQ (Xu et al. 2020, arXiv 2003.03603, §4.1) takes from ACGAN: a linear layer to a
    small map, then doublings by nearest neighbors, each with a 3x3 convolution, batch norm and leaky ReLU, a last
    convolution, tanh. ``width`` is the number of channels at full size, 64 in the paper for 32 pixels. The last
    batch norm is before the tanh and not after it, so that the range is exactly that of the pixels of ``info``.

    As in the papers, batch norm always uses the batch's own statistics and keeps none. So an image depends on its
    batch, a batch has at least two codes, and only the parameters are saved.
    """

    low: Tensor
    high: Tensor

    def __init__(self, *, latent: int, info: DataInfo, width: int) -> None:
        super().__init__()
        self.image_size = info.image_size
        start, channels = shape_of(info.image_size, width)
        self.first = nn.Sequential(
            nn.Linear(latent, channels[0] * start**2), nn.Unflatten(1, (channels[0], start, start)), _norm(channels[0])
        )
        doublings: list[nn.Module] = []
        for inputs, outputs in zip((channels[0], *channels), channels, strict=False):
            doublings += [
                nn.Upsample(scale_factor=2),
                nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
                _norm(outputs),
                nn.LeakyReLU(0.2),
            ]
        self.doublings = nn.Sequential(*doublings)
        self.last = nn.Sequential(
            nn.Conv2d(channels[-1], info.in_channels, 3, padding=1, bias=False), _norm(info.in_channels), nn.Tanh()
        )
        low, high = pixel_range(torch.zeros(1, info.in_channels, 1, 1), info)
        self.register_buffer("low", low, persistent=False)
        self.register_buffer("high", high, persistent=False)

    def forward(self, code: Tensor) -> Tensor:
        shown: Tensor = self.last(self.doublings(self.first(code)))
        edge = (shown.shape[-1] - self.image_size) // 2
        shown = shown[..., edge : edge + self.image_size, edge : edge + self.image_size]
        return self.low + (self.high - self.low) * (shown + 1) / 2


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, track_running_stats=False)
