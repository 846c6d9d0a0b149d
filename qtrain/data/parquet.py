"""Encoded images in parquet files, the layout of ImageNet on the Hugging Face hub; streaming.

Random access needs the rows mapped into memory, for which ``datasets`` keeps an uncompressed copy of the
files on disk (images stay encoded, so it is about as large as they are).
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from qtrain.data import source
from qtrain.data.cache import fingerprint
from qtrain.data.image_set import REPAIR_OR_CHECK, ImageSet
from qtrain.data.streaming import StreamingData


class RowImages(ImageSet):
    """The rows of a labeled split; ``files`` are those that hold them."""

    def __init__(self, split: source.Labeled, where: str, files: list[Path]) -> None:
        self._targets: np.ndarray = source.targets_of(split, where)
        self._rows = source.encoded(split)
        self._column = split.image
        self._where = where
        self._files = files
        self.num_classes = split.num_classes or int(self._targets.max()) + 1
        self.classes = split.classes

    def __len__(self) -> int:
        return len(self._targets)

    def image(self, number: int) -> Image.Image:
        return source.open_image(self._rows[number][self._column], self.where(number), remedy=REPAIR_OR_CHECK)

    def target(self, number: int) -> int:
        return int(self._targets[number])

    def where(self, number: int) -> str:
        return f"{self._where} image {number}"

    def fingerprint(self) -> str:
        return fingerprint(self._files, self._where, self._column, str(len(self)))


@dataclass(kw_only=True, eq=False, repr=False)
class ParquetImages(StreamingData):
    """``<train_split>*.parquet`` and ``<test_split>*.parquet`` in ``root``, or ``hub`` by name where that is None.

    ``cache_dir`` holds the mapped copy, by default the cache of ``datasets``.
    """

    root: str | None = None
    hub: str | None = None
    train_split: str = "train"
    test_split: str = "validation"
    image_column: str | None = None
    label_column: str | None = None
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hub is None and self.root is None:
            raise ValueError(f"{self.name}: give data.root=<folder of parquet files> or data.hub=<name on the hub>")

    def _train_images(self) -> RowImages:
        return self._split(self.train_split)

    def _test_images(self) -> RowImages:
        return self._split(self.test_split)

    def _check_classes(self, train: ImageSet, test: ImageSet) -> None:
        if test.num_classes > train.num_classes:
            raise ValueError(
                f"{self.name}: {self.test_split} has labels up to {test.num_classes - 1}, but {self.train_split} only "
                f"up to {train.num_classes - 1}; check that both are of one dataset"
            )
        source.check_names(self.name, train.classes, test.classes)

    def _split(self, split: str) -> RowImages:
        where = f"{self.name} ({split})"
        if self.root is not None:
            files = source.parquet_files(self.root, split)
            rows = source.open_large(files, self.cache_dir)
        else:
            rows = source.open_hub(str(self.hub), split)
            files = [Path(file["filename"]) for file in rows.cache_files]
        labeled = source.find_columns(rows, image=self.image_column, label=self.label_column, where=where)
        return RowImages(labeled, where, files)
