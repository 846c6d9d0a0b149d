"""Small datasets, whole on the training device: uint8 images in one tensor, augmented batch by batch there.

CIFAR-10 is 184 MB of bytes. Kept beside the model it needs no workers, no decoding and no copies, and a
batch costs a few kernels.
"""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from qtrain.data.augment import mix, normalize, plan_mix, random_crop_flip
from qtrain.data.base import VisionData
from qtrain.data.loader import EpochLoader
from qtrain.data.order import BatchOrder
from qtrain.spec import Batch, DataInfo
from qtrain.utils.checks import check_range


class Arrays(NamedTuple):
    """A decoded dataset: images (D, H, W, C) uint8 and targets (D,) int64 below ``num_classes``.

    ``classes`` are the classes' names, empty where they have none.
    """

    train_images: np.ndarray
    train_targets: np.ndarray
    test_images: np.ndarray
    test_targets: np.ndarray
    num_classes: int
    classes: tuple[str, ...] = ()


def no_images(like: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An empty split, with images of the shape of ``like`` (D, H, W, C), in place of one that is not read."""
    return like[:0], np.zeros(0, dtype=np.int64)


class BatchAugmentation(NamedTuple):
    """How a batch is made from bytes; ``num_classes`` is the width of mixed targets."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_classes: int
    channels_last: bool = True
    crop_padding: int = 0
    flip: bool = False
    mixup: float = 0.0
    cutmix: float = 0.0


class ResidentLoader(EpochLoader):
    """Batches made on the device that holds ``images`` (D, H, W, C) uint8 and ``targets`` (D,) int64.

    Augments only where ``order.train``.
    """

    def __init__(self, images: Tensor, targets: Tensor, order: BatchOrder, augmentation: BatchAugmentation) -> None:
        super().__init__(order)
        self._images = images
        self._targets = targets
        self._augmentation = augmentation

    def _batches(self, epoch: int, start: int) -> Iterator[Batch]:
        for samples in self._order.batches(epoch, start):
            yield self._augmented(samples, epoch) if self._order.train else self._plain(samples)

    def _plain(self, samples: Tensor) -> Batch:
        how, index = self._augmentation, samples.to(self._images.device)
        image = normalize(self._images[index], how.mean, how.std, channels_last=how.channels_last)
        return Batch(image, self._targets[index], index)

    def _augmented(self, samples: Tensor, epoch: int) -> Batch:
        how, index = self._augmentation, samples.to(self._images.device, non_blocking=True)
        key = {"seed": self._order.seed, "epoch": epoch}
        pixels = random_crop_flip(self._images, index, **key, padding=how.crop_padding, flip=how.flip)
        image = normalize(pixels, how.mean, how.std, channels_last=how.channels_last)
        target = self._targets[index]
        if how.mixup or how.cutmix:
            height, width = image.shape[2:]
            plan = plan_mix(samples[::2], **key, mixup=how.mixup, cutmix=how.cutmix, height=height, width=width)
            image, target = mix(image, target, plan, num_classes=how.num_classes)
        return Batch(image, target, index)


@dataclass(kw_only=True, eq=False, repr=False)
class DeviceData(VisionData):
    """Images whose bytes lie on the Lightning trainer's device, or on ``device`` where no trainer is attached.

    ``crop_padding`` and ``flip`` are He et al.'s augmentation (arXiv:1512.03385): a random crop from the image with so
    many black pixels around, mirrored with probability one half.
    """

    crop_padding: int = 0
    flip: bool = False
    device: str = "cpu"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(type(self).__name__, "[0, inf)", crop_padding=self.crop_padding, hint="in pixels")
        self._on_device: dict[str, tuple[Tensor, Tensor]] = {}

    def _resident(self, order: BatchOrder, split: str, images: np.ndarray, targets: np.ndarray) -> ResidentLoader:
        """Batches of a split, whose arrays move to the device once and are shared by all loaders."""
        device = self.trainer.strategy.root_device if self.trainer else torch.device(self.device)
        if split not in self._on_device or self._on_device[split][0].device != device:
            self._on_device[split] = (torch.from_numpy(images).to(device), torch.from_numpy(targets).to(device))
        how = BatchAugmentation(
            mean=self.info.mean,
            std=self.info.std,
            num_classes=self.info.num_classes,
            channels_last=self.channels_last,
            crop_padding=self.crop_padding,
            flip=self.flip,
            mixup=self.mixup,
            cutmix=self.cutmix,
        )
        return ResidentLoader(*self._on_device[split], order, how)


@dataclass(kw_only=True, eq=False, repr=False)
class ResidentData(DeviceData):
    """A dataset that fits on the device; a subclass says where its arrays come from.

    Without ``mean`` and ``std`` they are computed from the training images.
    """

    @abstractmethod
    def _arrays(self) -> Arrays:
        """Decode the dataset, or find it decoded; where ``_test_only``, with ``no_images`` for training."""

    def _read(self) -> None:
        self._decoded = self._arrays()

    def _sizes(self) -> tuple[int, int]:
        return len(self._decoded.train_images), len(self._decoded.test_images)

    def _describe(self, train_size: int, val_size: int, test_size: int) -> DataInfo:
        images = self._decoded.train_images
        if self._test_only and not (self.mean and self.std):
            raise ValueError(
                f"{self.name}: mean and std are computed from the training images, which are not read; give "
                "data.mean and data.std, those that the model was trained with"
            )
        mean, std = (self.mean, self.std) if self.mean and self.std else channel_statistics(images)
        return DataInfo(
            name=self.name,
            num_classes=self._decoded.num_classes,
            in_channels=images.shape[3],
            image_size=images.shape[1],
            mean=tuple(float(m) for m in mean),
            std=tuple(float(s) for s in std),
            train_size=train_size,
            val_size=val_size,
            test_size=test_size,
            kind="resident",
            classes=self._decoded.classes,
        )

    def _content(self) -> str:
        images = np.ascontiguousarray(self._decoded.train_images)
        digest = sha256(str(images.shape).encode() + images.tobytes())
        digest.update(np.ascontiguousarray(self._decoded.train_targets).astype(np.int64).tobytes())
        return digest.hexdigest()

    def _loader(self, order: BatchOrder, *, test_images: bool) -> ResidentLoader:
        found = self._decoded
        if test_images:
            return self._resident(order, "test", found.test_images, found.test_targets)
        return self._resident(order, "train", found.train_images, found.train_targets)


def channel_statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of (D, H, W, C) uint8, in units of pixel / 255, from exact counts."""
    values = np.arange(256) / 255
    mean, std = [], []
    for channel in range(images.shape[3]):
        share = np.bincount(images[..., channel].reshape(-1), minlength=256) / images[..., channel].size
        average = float(share @ values)
        mean.append(average)
        std.append(max(float(share @ (values - average) ** 2) ** 0.5, 1 / 255))
    return tuple(mean), tuple(std)
