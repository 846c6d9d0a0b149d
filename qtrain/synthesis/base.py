"""The interface of all ways to make images without data."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from qtrain.functional.layout import arranged
from qtrain.spec import DataInfo


@dataclass(frozen=True)
class Made:
    """One batch of synthesized images: ``images`` (N, H, W, C) uint8, ``labels`` (N,) int64 class indices.

    ``metrics`` tell by name how good the batch is; a manifest stores them and reports their means.
    """

    images: Tensor
    labels: Tensor
    metrics: Mapping[str, float] = field(default_factory=dict)


class Synthesis(ABC):
    """Makes images that a model takes for its training data, batch by batch. Subclasses are final.

    Batch ``number`` depends only on the models, the options, ``seed`` and ``number``, not on the process or on the
    batches made before. So workers divide the numbers among them, and a stopped synthesis continues with the missing
    ones.

    ``models`` are in full precision, in eval mode, without gradients for their parameters, on ``device``; each takes
    (N, C, H, W) float, normalized with the mean and std of ``info``, in the memory format of its own weights. There is
    at least one.
    """

    batch_size: int

    @abstractmethod
    def check(self, models: Sequence[nn.Module]) -> None:
        """Raise ``ValueError``, with the remedy, if the models lack something that this method needs."""

    def learn(  # noqa: B027 - few methods have something to learn
        self, models: Sequence[nn.Module], info: DataInfo, *, seed: int, folder: Path, device: torch.device
    ) -> None:
        """Train what all batches share (a generator), or load it from ``folder``; a stopped training continues.

        Called in every process before the first :meth:`make`, in one process at a time. Does nothing where batches
        have nothing in common.
        """

    @abstractmethod
    def make(
        self, models: Sequence[nn.Module], info: DataInfo, *, number: int, seed: int, device: torch.device
    ) -> Made:
        """Batch ``number``, of ``batch_size`` images."""


def to_pixels(images: Tensor, info: DataInfo) -> Tensor:
    """Normalized ``images`` (N, C, H, W) as pixels (N, H, W, C) uint8, on the CPU."""
    mean, std = _per_channel(images, info)
    return ((images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()


def from_pixels(
    pixels: Tensor, info: DataInfo, device: torch.device, memory_format: torch.memory_format = torch.contiguous_format
) -> Tensor:
    """Pixels (N, H, W, C) uint8 as normalized images (N, C, H, W) on ``device`` in ``memory_format``."""
    images = pixels.to(device).permute(0, 3, 1, 2).float() / 255
    mean, std = _per_channel(images, info)
    return arranged((images - mean) / std, channels_last=memory_format == torch.channels_last)


def pixel_range(images: Tensor, info: DataInfo) -> tuple[Tensor, Tensor]:
    """Lowest and highest normalized value of each channel, (1, C, 1, 1): those of black and of white pixels."""
    mean, std = _per_channel(images, info)
    return -mean / std, (1 - mean) / std


def _per_channel(images: Tensor, info: DataInfo) -> tuple[Tensor, Tensor]:
    mean, std = (
        torch.tensor(v, dtype=images.dtype, device=images.device).view(1, -1, 1, 1) for v in (info.mean, info.std)
    )
    return mean, std
