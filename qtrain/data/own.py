"""Images of the user's own: a function that returns two torch datasets, one for training and one for testing.

Each item is read again in each epoch, by worker processes, so that a dataset may be larger than memory and may draw
random numbers of its own; images in bytes are cropped, mirrored and normalized here, as those of other data sets.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256

import numpy as np
import torch
from torch import Tensor

from qtrain.data.augment import crop_and_flip, normalize, random_windows
from qtrain.data.base import VisionData
from qtrain.data.image_set import ImageError
from qtrain.data.order import BatchOrder
from qtrain.data.own_items import OwnItems, OwnSamples, class_names, is_indexed, known_labels
from qtrain.data.resident import channel_statistics
from qtrain.data.streaming_loader import Collate, StreamingLoader, seeded
from qtrain.spec import DataInfo
from qtrain.utils.checks import check_range
from qtrain.utils.user_code import BuilderPath, call_builder

log = logging.getLogger(__name__)

STATISTICS = 1000
"""Number of training images, spread evenly, from which mean and standard deviation are computed."""
MOST_WORKERS = 4
"""Processes for each loader where nothing else is asked for."""
SHOWN = 5
"""Number of bad items that one message names."""


@dataclass(frozen=True)
class FromBytes:
    """Bytes (N, H, W, C) to normalized images (N, C, H, W); in training cropped and mirrored before.

    The window of an image is a function of (seed, epoch, its number).
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    seed: int
    channels_last: bool
    padding: int = 0
    flip: bool = False

    def __call__(self, pixels: Tensor, index: Tensor, epoch: int) -> Tensor:
        if self.padding or self.flip:
            windows = random_windows(index, seed=self.seed, epoch=epoch, padding=self.padding, flip=self.flip)
            pixels = crop_and_flip(pixels, torch.arange(len(index)), *windows)
        return normalize(pixels, self.mean, self.std, channels_last=self.channels_last)


@dataclass(kw_only=True, eq=False, repr=False)
class OwnImages(VisionData):
    """The two torch datasets, training and test, that ``builder``, called with ``options``, returns.

    An item is a pair (image, label). Images are square and all alike: PIL images, uint8 arrays or tensors, or float
    tensors (C, H, W). Floats count as normalized and are taken as they are; ``mean`` and ``std`` then only say by what
    they were normalized. Those of images in bytes are computed, where they are not given, from up to 1000 training
    images. ``crop_padding`` and ``flip`` augment images in bytes, as in ``ResidentData``.

    Names of classes are the dataset's attribute ``classes``. Their number is that of the names, or ``num_classes``, or
    follows from the labels: from the attribute ``targets``, or by reading all items once. ``check`` reads all items
    before anything else, and names those that are wrong in one error. ``workers`` are processes for each loader on each
    rank; ``None`` is one for each core, four at most.
    """

    builder: BuilderPath
    options: Mapping[str, object] = field(default_factory=dict)
    num_classes: int | None = None
    crop_padding: int = 0
    flip: bool = False
    check: bool = False
    workers: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        owner = type(self).__name__
        check_range(owner, "[0, inf)", crop_padding=self.crop_padding, workers=self.workers)
        check_range(owner, "[1, inf)", num_classes=self.num_classes)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._workers = min(cores, MOST_WORKERS) if self.workers is None else self.workers

    def _read(self) -> None:
        with seeded(0):  # a random split is the same in each process and for each seed of a run
            made = call_builder(self.builder, self.options)
        if not isinstance(made, tuple | list) or len(made) != 2 or not all(is_indexed(own) for own in made):
            kinds = ", ".join(type(own).__name__ for own in made) if isinstance(made, tuple | list) else ""
            raise ValueError(
                f"{self.builder} must return two datasets with a length and items by number, (training, test), got "
                f"{f'({kinds})' if kinds else f'a value of type {type(made).__name__}'}"
            )
        self._train, self._test = (
            OwnItems(own, f"{self.builder}: {part}") for own, part in zip(made, ("training", "test"), strict=True)
        )
        if self._test_only:
            self._train = OwnItems([], self._train.name)
        self._used = [self._test] if self._test_only else [self._train, self._test]
        for items in self._used:
            if not len(items):
                raise ValueError(f"{items.name} set is empty")
        self._facts = self._used[0].read(0).facts
        if self._facts.floats and (self.crop_padding or self.flip):
            raise ValueError(
                f"{self.builder}: images are floats, which are taken as they are; leave crop_padding 0 and flip false, "
                "or return images in bytes"
            )
        self._class_names = self._names()
        known = self.num_classes or len(self._class_names) or self._counted()
        if known is None or self.check:
            known = self._scanned(known)
        self._classes = known
        for items in self._used:
            for number in items.sampled():
                items.checked(number, self._facts, self._classes)

    def _names(self) -> tuple[str, ...]:
        """The names of the classes, which both datasets have if one has them."""
        names = [class_names(items.dataset) for items in self._used]
        if len(set(filter(None, names))) > 1:
            odd = sorted(set(names[0]) ^ set(names[1])) or ["their order"]
            raise ValueError(
                f"{self.builder}: training and test set must have the same classes, they differ in: "
                f"{', '.join(odd[:SHOWN])}"
            )
        found = next(filter(None, names), ())
        if found and self.num_classes not in (None, len(found)):
            raise ValueError(f"{self.builder}: num_classes is {self.num_classes}, but the datasets name {len(found)}")
        return found

    def _counted(self) -> int | None:
        """The number of classes from labels that the datasets have at hand."""
        labels = [known_labels(items.dataset) for items in self._used]
        largest = [int(own.max()) for own in labels if own is not None]
        return 1 + max(largest) if len(largest) == len(labels) else None

    def _scanned(self, num_classes: int | None) -> int:
        """The number of classes after a look at all items. Raises ``ValueError`` with those that are wrong."""
        bad: list[str] = []
        largest = 0
        for items in self._used:
            why = "" if self.check else ", for the labels"
            log.info("%s: reading all %d items once%s", items.name, len(items), why)
            for found in items.scan(self._facts, num_classes, workers=self._workers):
                if isinstance(found, ImageError):
                    bad.append(str(found))
                else:
                    largest = max(largest, found)
        if bad:
            more = f"; and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
            total = sum(map(len, self._used))
            raise ValueError(f"{len(bad)} of {total} items cannot be used: {'; '.join(bad[:SHOWN])}{more}")
        return num_classes or largest + 1

    def _sizes(self) -> tuple[int, int]:
        return len(self._train), len(self._test)

    def _describe(self, train_size: int, val_size: int, test_size: int) -> DataInfo:
        mean, std = self._statistics()
        return DataInfo(
            name=self.name,
            num_classes=self._classes,
            in_channels=self._facts.channels,
            image_size=self._facts.image_size,
            mean=tuple(map(float, mean)),
            std=tuple(map(float, std)),
            train_size=train_size,
            val_size=val_size,
            test_size=test_size,
            kind="streaming",
            classes=self._class_names,
        )

    def _statistics(self) -> tuple[Sequence[float], Sequence[float]]:
        if self.mean and self.std:
            return self.mean, self.std
        if self._facts.floats:
            log.info(
                "%s: images are floats and taken as they are; data.mean and data.std may say by what they were "
                "normalized, 0 and 1 are assumed",
                self.name,
            )
            return [0.0] * self._facts.channels, [1.0] * self._facts.channels
        if self._test_only:
            raise ValueError(
                f"{self.name}: mean and std are computed from the training images, which are not read; give data.mean "
                "and data.std, those that the model was trained with"
            )
        numbers = self._train.sampled(STATISTICS)
        return channel_statistics(np.stack([self._item(number).numpy() for number in numbers]))

    def _item(self, number: int) -> Tensor:
        return self._train.checked(number, self._facts, self._classes).pixels

    def _content(self) -> str:
        digest = sha256(f"{len(self._train)} {self._facts}".encode())
        for number in self._train.sampled():
            item = self._train.checked(number, self._facts, self._classes)
            digest.update(f"{item.label} ".encode() + item.pixels.numpy().tobytes())
        return digest.hexdigest()

    def _loader(self, order: BatchOrder, *, test_images: bool) -> StreamingLoader:
        info, items = self.info, self._test if test_images else self._train
        finish = None if self._facts.floats else self._from_bytes(info, order)
        mixing = (self.mixup, self.cutmix) if order.train else (0.0, 0.0)
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return StreamingLoader(
            OwnSamples(items, self._facts, self._classes, seed=order.seed, train=order.train),
            order,
            Collate(info.num_classes, order.seed, self.channels_last, *mixing, finish=finish),
            workers=min(self._workers, len(order)),
            pin_memory=on_gpu,
        )

    def _from_bytes(self, info: DataInfo, order: BatchOrder) -> FromBytes:
        padding, flip = (self.crop_padding, self.flip) if order.train else (0, False)
        return FromBytes(info.mean, info.std, order.seed, self.channels_last, padding, flip)
