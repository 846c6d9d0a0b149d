"""Large datasets: encoded images read at random by worker processes, transformed there by timm's pipelines.

The transforms draw from the global generators of Python, NumPy and torch. So that a sample's augmentation
is a function of (seed, epoch, sample) and not of which worker got it when, these are seeded around each sample; the
sampler therefore hands workers (epoch, sample) pairs, and a worker keeps no state at all.
"""

import random as python_random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from typing import final

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from qtrain.data.augment import mix, plan_mix
from qtrain.data.base import VisionData
from qtrain.data.loader import EpochLoader
from qtrain.data.order import BatchOrder
from qtrain.data.workers import outlive_sigterm
from qtrain.functional.random import seed_of
from qtrain.models.transforms import create_transform
from qtrain.spec import Batch, DataInfo
from qtrain.utils.checks import check_range

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

SAMPLED = 64
"""Number of images, spread evenly, whose pixels are hashed to tell a data set from others."""

Sample = tuple[Tensor, int, int, int]
"""What a worker makes of one image: pixels (C, H, W), target, sample number, epoch."""


class ImageSet(ABC):
    """Labeled images at random access; must be cheap to copy into a worker process."""

    num_classes: int

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def image(self, number: int) -> Image.Image:
        """Decode one image."""

    @abstractmethod
    def target(self, number: int) -> int:
        """Its class."""


@final
class NoImages(ImageSet):
    """Stands in for training images that are not read."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes

    def __len__(self) -> int:
        return 0

    def image(self, number: int) -> Image.Image:
        raise IndexError(number)

    def target(self, number: int) -> int:
        raise IndexError(number)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed Python's, NumPy's and torch's CPU generators, and give them back as they were."""
    python_state, numpy_state = python_random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        python_random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            python_random.setstate(python_state)
            np.random.set_state(numpy_state)


class TransformedImages(Dataset[Sample]):
    """What runs in a worker: (epoch, number) in, transformed sample out."""

    def __init__(self, images: ImageSet, transform: Callable[[Image.Image], Tensor], seed: int) -> None:
        self._images = images
        self._transform = transform
        self._seed = seed

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, number = key
        image = self._images.image(number)
        with seeded(seed_of(self._seed, epoch, number)):
            pixels = self._transform(image)
        return pixels, self._images.target(number), number, epoch


@dataclass(frozen=True)
class Collate:
    """Samples to a ``Batch``, mixed where an alpha is above 0. Runs in a worker too, where it does not hold up the
    training."""

    num_classes: int
    seed: int
    channels_last: bool
    mixup: float = 0.0
    cutmix: float = 0.0

    def __call__(self, samples: list[Sample]) -> Batch:
        pixels, targets, numbers, epochs = zip(*samples, strict=True)
        image, target, index = torch.stack(pixels), torch.tensor(targets), torch.tensor(numbers)
        if self.mixup or self.cutmix:
            height, width = image.shape[2:]
            plan = plan_mix(
                index[::2],
                seed=self.seed,
                epoch=epochs[0],
                mixup=self.mixup,
                cutmix=self.cutmix,
                height=height,
                width=width,
            )
            image, target = mix(image, target, plan, num_classes=self.num_classes)
        memory_format = torch.channels_last if self.channels_last else torch.contiguous_format
        return Batch(image.contiguous(memory_format=memory_format), target, index)


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """The batch sampler: (epoch, number) pairs of what ``choose`` was last called with."""

    def __init__(self, order: BatchOrder) -> None:
        self._order = order
        self.choose(epoch=0, start=0)

    def choose(self, *, epoch: int, start: int) -> None:
        """Go through ``epoch`` from batch ``start`` on when iterated next."""
        self._epoch, self._start = epoch, start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for samples in self._order.batches(self._epoch, self._start):
            yield [(self._epoch, number) for number in samples.tolist()]

    def __len__(self) -> int:
        return len(self._order) - self._start


class StreamingLoader(EpochLoader):
    """Batches from ``workers`` processes (0: from this one); those for training live as long as the loader.

    This class owns a ``DataLoader`` and is not one itself: Lightning would replace a DataLoader's sampler for several
    ranks, but the order here is already sliced over ranks.
    """

    def __init__(
        self, dataset: TransformedImages, order: BatchOrder, collate: Collate, *, workers: int, pin_memory: bool
    ) -> None:
        super().__init__(order)
        self._plan = EpochBatches(order)
        # A generator of its own, because each pass draws a seed for the workers, which must not disturb the global one.
        self._loader = DataLoader(
            dataset,
            batch_sampler=self._plan,
            collate_fn=collate,
            num_workers=workers,
            persistent_workers=workers > 0 and order.train,
            pin_memory=pin_memory,
            generator=torch.Generator(),
            worker_init_fn=outlive_sigterm,
        )

    def _batches(self, epoch: int, start: int) -> Iterator[Batch]:
        self._plan.choose(epoch=epoch, start=start)
        yield from self._loader


@dataclass(kw_only=True, eq=False, repr=False)
class StreamingData(VisionData):
    """A dataset that is decoded as it is read; a subclass says where its images are.

    Training images get timm's random resized crop, mirroring, and where asked for ``auto_augment`` (for example
    ``rand-m9-mstd0.5``) and random erasing with probability ``re_prob``; others are resized so that ``image_size`` is
    ``crop_pct`` of the shorter side, and cropped in the middle. ``workers`` are processes for each loader on each
    rank. Without ``mean`` and ``std`` they are ImageNet's.
    """

    image_size: int = 224
    crop_pct: float = 0.875
    interpolation: str = "bicubic"
    auto_augment: str | None = None
    re_prob: float = 0.0
    workers: int = 4
    channels_last: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        owner = type(self).__name__
        check_range(owner, "[1, inf)", image_size=self.image_size, hint="in pixels")
        check_range(owner, "(0, 1]", crop_pct=self.crop_pct)
        check_range(owner, "[0, 1]", re_prob=self.re_prob)
        check_range(owner, "[0, inf)", workers=self.workers, hint="0 decodes in the main process")

    @abstractmethod
    def _train_images(self) -> ImageSet:
        """The training images."""

    @abstractmethod
    def _test_images(self) -> ImageSet:
        """The test images, opened without the training images."""

    @abstractmethod
    def _check_classes(self, train: ImageSet, test: ImageSet) -> None:
        """Raise ``ValueError`` if the two have different classes."""

    def _read(self) -> None:
        if self._test_only:
            self._test_set = self._test_images()
            self._train_set: ImageSet = NoImages(self._test_set.num_classes)
        else:
            self._train_set, self._test_set = self._train_images(), self._test_images()
            self._check_classes(self._train_set, self._test_set)

    def _sizes(self) -> tuple[int, int]:
        return len(self._train_set), len(self._test_set)

    def _describe(self, train_size: int, val_size: int, test_size: int) -> DataInfo:
        return DataInfo(
            name=self.name,
            num_classes=self._train_set.num_classes,
            in_channels=3,
            image_size=self.image_size,
            mean=tuple(float(m) for m in self.mean or IMAGENET_MEAN),
            std=tuple(float(s) for s in self.std or IMAGENET_STD),
            train_size=train_size,
            val_size=val_size,
            test_size=test_size,
            kind="streaming",
        )

    def _content(self) -> str:
        images, count = self._train_set, len(self._train_set)
        digest = sha256(np.array([images.target(number) for number in range(count)]).tobytes())
        for number in np.linspace(0, count - 1, min(count, SAMPLED)).astype(int).tolist():
            digest.update(np.asarray(images.image(number)).tobytes())
        return digest.hexdigest()

    def _loader(self, order: BatchOrder, *, test_images: bool) -> StreamingLoader:
        info = self.info
        transform = create_transform(
            image_size=self.image_size,
            train=order.train,
            mean=info.mean,
            std=info.std,
            auto_augment=self.auto_augment,
            re_prob=self.re_prob,
            interpolation=self.interpolation,
            crop_pct=self.crop_pct,
        )
        images = self._test_set if test_images else self._train_set
        mixing = {"mixup": self.mixup, "cutmix": self.cutmix} if order.train else {}
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return StreamingLoader(
            TransformedImages(images, transform, order.seed),
            order,
            Collate(info.num_classes, order.seed, self.channels_last, **mixing),
            workers=self.workers,
            pin_memory=on_gpu,
        )
