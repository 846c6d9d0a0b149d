"""Images synthesized from a model, in place of the images that it was trained on; resident.

What ``task=synthesize`` writes is a folder of parquet files and a manifest, :mod:`qtrain.data.synthetic_store`. Real
images serve only for the final evaluation; their data set does not read its training images.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qtrain.data.base import VisionData
from qtrain.data.loader import EpochLoader
from qtrain.data.order import BatchOrder
from qtrain.data.resident import DeviceData
from qtrain.data.synthetic_store import read_manifest
from qtrain.spec import DataInfo
from qtrain.utils.checks import check_range


@dataclass(kw_only=True, eq=False, repr=False)
class SyntheticImages(DeviceData):
    """The synthetic images of ``folder`` for training and calibration, and the test images of ``test``.

    ``mean`` and ``std`` are those that the model was trained with, in units of pixel / 255. ``image_size`` and
    ``in_channels`` say what images the model takes. ``crop_padding`` and ``flip`` as for real images.
    Without ``test`` nothing can be evaluated.
    """

    folder: str | None = None
    num_classes: int
    image_size: int
    in_channels: int
    mean: Sequence[float] | None
    std: Sequence[float] | None
    test: VisionData | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        owner = type(self).__name__
        if self.mean is None:
            raise ValueError(f"{owner}: mean and std are needed, those that the model was trained with; give data.mean")
        check_range(owner, "[2, inf)", num_classes=self.num_classes)
        check_range(owner, "[1, inf)", image_size=self.image_size, in_channels=self.in_channels)
        if self.test is not None:
            self.test.test_only()
        self._test_info: DataInfo | None = None

    @property
    def facts(self) -> DataInfo:
        """The facts that are known before there are images: classes, shape, mean and std."""
        return self._describe(0, 0, 0)

    def _read(self) -> None:
        self._images = np.zeros((0, self.image_size, self.image_size, self.in_channels), dtype=np.uint8)
        self._targets = np.zeros(0, dtype=np.int64)
        if self.folder is not None and not self._test_only:
            self._images, self._targets = self._read_images(self.folder)
        if self.test is not None:
            self.test.setup()
            self._check_test(self.test.info)
            self._test_info = self.test.info

    def _read_images(self, folder: str) -> tuple[np.ndarray, np.ndarray]:
        from qtrain.data import source  # an extra that only synthetic images need

        where = f"{self.name} (synthetic)"
        files = read_manifest(folder).checked_files()
        rows = source.find_columns(source.open_small(files), image="image", label="label", where=where)
        images, targets = source.decode_images(rows, where), source.targets_of(rows, where)
        wanted = (self.image_size, self.image_size, self.in_channels)
        if images.shape[1:] != wanted:
            raise ValueError(
                f"data.folder: the images in {folder} are {images.shape[1:]} (height, width, channels), not {wanted}; "
                "synthesize others, or set data.image_size and data.in_channels"
            )
        if targets.max() >= self.num_classes:
            raise ValueError(
                f"data.folder: the images in {folder} have labels up to {targets.max()}, but data.num_classes is "
                f"{self.num_classes}"
            )
        return images, targets

    def _check_test(self, info: DataInfo) -> None:
        here = (self.num_classes, self.image_size, self.in_channels)
        there = (info.num_classes, info.image_size, info.in_channels)
        if here != there:
            raise ValueError(
                f"data.test: {info.name} has (num_classes, image_size, in_channels) {there}, and data {here}; "
                "make them equal"
            )
        ours, theirs = self.facts, info
        pairs = zip((*ours.mean, *ours.std), (*theirs.mean, *theirs.std), strict=True)
        if any(abs(a - b) > 1e-6 for a, b in pairs):
            raise ValueError("data.test: mean and std must be those of data, the ones that the model was trained with")

    def _sizes(self) -> tuple[int, int]:
        return len(self._images), 0 if self.test is None else self.test.info.test_size

    def _describe(self, train_size: int, val_size: int, test_size: int) -> DataInfo:
        assert self.mean is not None and self.std is not None
        test = self._test_info
        return DataInfo(
            name=self.name,
            num_classes=self.num_classes,
            in_channels=self.in_channels,
            image_size=self.image_size,
            mean=tuple(float(m) for m in self.mean),
            std=tuple(float(s) for s in self.std),
            train_size=train_size,
            val_size=val_size,
            test_size=test_size,
            kind="resident",
            classes=test.classes if test else (),
            crop_pct=test.crop_pct if test else 1.0,
            interpolation=test.interpolation if test else "bicubic",
        )

    def _content(self) -> str:
        assert self.folder is not None
        return read_manifest(self.folder).identity

    def _loader(self, order: BatchOrder, *, test_images: bool) -> EpochLoader:
        if test_images:
            assert self.test is not None, "without it there are no test images"
            return self.test.test_loader(order)
        return self._resident(order, "train", self._images, self._targets)
