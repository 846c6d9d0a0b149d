"""Large datasets: encoded images that worker processes read at random, decode and transform.

Options that are not given follow from a look at some of the images: their size, their channels, and how they are cut.
"""

import logging
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Literal

import numpy as np

from qtrain.data.base import VisionData
from qtrain.data.check import readable, require_same_images
from qtrain.data.image_set import ImageSet, NoImages, looks_of, sampled
from qtrain.data.order import BatchOrder
from qtrain.data.streaming_loader import Collate, StreamingLoader, TransformedImages
from qtrain.data.view import View
from qtrain.models.transforms import Crop, create_transform
from qtrain.spec import DataInfo
from qtrain.utils.checks import check_range
from qtrain.utils.errors import as_config_error

log = logging.getLogger(__name__)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
GRAY_MEAN = (sum(IMAGENET_MEAN) / 3,)
GRAY_STD = (sum(IMAGENET_STD) / 3,)
"""Of one channel, where nothing else is said."""


@dataclass(kw_only=True, eq=False, repr=False)
class StreamingData(VisionData):
    """A dataset that is decoded as it is read; a subclass says where its images are.

    ``image_size``, ``crop``, ``crop_scale``, ``crop_padding``, ``crop_pct`` and ``flip`` are those of
    ``qtrain.data.view.View``: small square images are padded and cropped, others get timm's random resized crop.
    ``auto_augment`` is a policy of timm's (for example ``rand-m9-mstd0.5``), and ``re_prob`` the probability of random
    erasing. ``channels`` is 1 or 3; ``None`` is as many as ``mean`` has, else 1 where all images that are looked at are
    gray, else 3. Without ``mean`` and ``std`` they are ImageNet's. ``workers`` are processes for each loader on each
    rank.

    ``check`` decodes all images before anything else, and names those that cannot be decoded in one error.
    ``on_error="skip"`` leaves these out instead. It checks first, so that which images make an epoch is known before
    the first one, and is the same on all ranks and after each resumption. An image that becomes unreadable later is an
    error, as with ``"raise"``.
    """

    image_size: int | None = None
    crop: Crop | None = None
    crop_scale: Sequence[float] | None = None
    crop_padding: int | None = None
    crop_pct: float | None = None
    flip: bool | None = None
    interpolation: str = "bicubic"
    auto_augment: str | None = None
    re_prob: float = 0.0
    channels: int | None = None
    check: bool = False
    on_error: Literal["raise", "skip"] = "raise"
    workers: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        owner = type(self).__name__
        check_range(owner, "[1, inf)", image_size=self.image_size, hint="in pixels")
        check_range(owner, "[0, inf)", crop_padding=self.crop_padding, hint="in pixels")
        check_range(owner, "(0, 1]", crop_pct=self.crop_pct)
        check_range(owner, "[0, 1]", re_prob=self.re_prob)
        check_range(owner, "[0, inf)", workers=self.workers, hint="0 decodes in the main process")
        if self.crop_scale is not None:
            self.crop_scale = [*self.crop_scale]  # plain values for the identity
        with as_config_error(owner):
            self._chosen_view = View(
                image_size=self.image_size,
                crop=self.crop,
                crop_scale=self.crop_scale,
                crop_padding=self.crop_padding,
                crop_pct=self.crop_pct,
                flip=self.flip,
            )
        if self.channels not in (None, 1, 3):
            raise ValueError(f"{owner}: channels must be 1 (gray) or 3 (color), got {self.channels}")
        if self.on_error not in ("raise", "skip"):
            raise ValueError(f"{owner}: on_error must be raise or skip, got {self.on_error!r}")

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
            test = self._test_images()
            train: ImageSet = NoImages(test.num_classes)
        else:
            train, test = self._train_images(), self._test_images()
            self._check_classes(train, test)
        if self.check or self.on_error == "skip":
            train, test = readable((train, test), self.name, workers=self.workers, skip=self.on_error == "skip")
        self._train_set, self._test_set = train, test
        self._settle()

    def _settle(self) -> None:
        """Choose what the options leave open, by a look at some images."""
        test = looks_of(self._test_set)
        looks = test if self._test_only else looks_of(self._train_set)
        self._view = self._chosen_view.settled(looks)
        gray = looks.gray and test.gray
        self._gray_expected = gray and self.channels is None and not self.mean
        one = self._gray_expected or (self.mean is not None and len(self.mean) == 1)
        self._channels = self.channels or (1 if one else 3)
        if looks.side is not None or gray:
            small = f"small images, {looks.side}x{looks.side}" if looks.side else "gray images"
            log.info("%s: %s: %s, channels=%d (docs/images.md)", self.name, small, self._view, self._channels)

    def _sizes(self) -> tuple[int, int]:
        return len(self._train_set), len(self._test_set)

    def _describe(self, train_size: int, val_size: int, test_size: int) -> DataInfo:
        names = self._train_set.classes or self._test_set.classes
        return DataInfo(
            name=self.name,
            num_classes=self._train_set.num_classes,
            in_channels=self._channels,
            image_size=self._view.image_size,
            mean=tuple(float(m) for m in self.mean or (IMAGENET_MEAN if self._channels == 3 else GRAY_MEAN)),
            std=tuple(float(s) for s in self.std or (IMAGENET_STD if self._channels == 3 else GRAY_STD)),
            train_size=train_size,
            val_size=val_size,
            test_size=test_size,
            kind="streaming",
            classes=names if len(names) == self._train_set.num_classes else (),
            crop_pct=self._view.crop_pct,
            interpolation=self.interpolation,
        )

    def _content(self) -> str:
        images, count = self._train_set, len(self._train_set)
        digest = sha256(np.array([images.target(number) for number in range(count)]).tobytes())
        for number in sampled(images):
            digest.update(np.asarray(images.image(number)).tobytes())
        return digest.hexdigest()

    def _loader(self, order: BatchOrder, *, test_images: bool) -> StreamingLoader:
        info = self.info
        transform = create_transform(
            train=order.train,
            mean=info.mean,
            std=info.std,
            auto_augment=self.auto_augment,
            re_prob=self.re_prob,
            interpolation=self.interpolation,
            **asdict(self._view),
        )
        images = self._test_set if test_images else self._train_set
        if self.on_error == "skip" and self.trainer is not None:
            require_same_images(images, self.name, self.trainer.strategy.root_device)
        mixing = (self.mixup, self.cutmix) if order.train else (0.0, 0.0)
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return StreamingLoader(
            TransformedImages(images, transform, order.seed, gray=self._gray_expected),
            order,
            Collate(info.num_classes, order.seed, self.channels_last, *mixing),
            workers=self.workers,
            pin_memory=on_gpu,
        )
