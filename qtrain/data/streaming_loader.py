"""A loader whose worker processes decode images and transform them by timm's pipelines.

The transforms draw from the global generators of Python, NumPy and torch. So that a sample's augmentation
is a function of (seed, epoch, sample) and not of which worker got it when, these are seeded around each sample; the
sampler therefore hands workers (epoch, sample) pairs, and a worker keeps no state at all.
"""

import random as python_random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from qtrain.data.augment import mix, plan_mix
from qtrain.data.image_set import SAMPLED, ImageError, ImageSet
from qtrain.data.loader import EpochLoader
from qtrain.data.order import BatchOrder
from qtrain.data.workers import outlive_sigterm
from qtrain.functional.layout import arranged
from qtrain.functional.random import seed_of
from qtrain.spec import Batch

Sample = tuple[Tensor, int, int, int]
"""What a worker makes of one image: pixels (C, H, W), target, sample number, epoch."""


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


class TransformedImages(Dataset[Sample | ImageError]):
    """What runs in a worker: (epoch, number) in, transformed sample out.

    An image that cannot be used comes out as its error: raised in a worker, it would reach the user with torch's words
    around it. ``gray`` says that color is unexpected, and an error.
    """

    def __init__(
        self, images: ImageSet, transform: Callable[[Image.Image], Tensor], seed: int, *, gray: bool = False
    ) -> None:
        self._images = images
        self._transform = transform
        self._seed = seed
        self._gray = gray

    def __getitem__(self, key: tuple[int, int]) -> Sample | ImageError:
        epoch, number = key
        try:
            image = self._images.image(number)
        except ImageError as error:
            return error
        if self._gray and image.mode != "L":
            return ImageError(
                f"{self._images.where(number)}: is in color, but the up to {SAMPLED} images that were looked at are "
                "gray; say data.channels=3, or data.channels=1 to make all gray"
            )
        with seeded(seed_of(self._seed, epoch, number)):
            pixels = self._transform(image)
        return pixels, self._images.target(number), number, epoch


@dataclass(frozen=True)
class Collate:
    """Samples to a ``Batch``, mixed where an alpha is above 0. Runs in a worker too, where it does not hold up the
    training.

    ``finish`` makes images (N, C, H, W) of the stacked samples, their numbers and the epoch, where they are none yet.
    """

    num_classes: int
    seed: int
    channels_last: bool
    mixup: float = 0.0
    cutmix: float = 0.0
    finish: Callable[[Tensor, Tensor, int], Tensor] | None = None

    def __call__(self, samples: Sequence[Sample | ImageError]) -> Batch | ImageError:
        good: list[Sample] = []
        for sample in samples:
            if isinstance(sample, ImageError):
                return sample
            good.append(sample)
        pixels, targets, numbers, epochs = zip(*good, strict=True)
        image, target, index = torch.stack(pixels), torch.tensor(targets), torch.tensor(numbers)
        if self.finish is not None:
            image = self.finish(image, index, epochs[0])
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
        return Batch(arranged(image, channels_last=self.channels_last), target, index)


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
        self,
        dataset: Dataset[Sample | ImageError],
        order: BatchOrder,
        collate: Collate,
        *,
        workers: int,
        pin_memory: bool,
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
        for batch in self._loader:
            if isinstance(batch, ImageError):
                raise batch
            yield batch
