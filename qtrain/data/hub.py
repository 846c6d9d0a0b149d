"""Small labeled image sets by way of the ``datasets`` library: CIFAR, MNIST and their like, resident.

Decoded once, kept as bytes in a cache file, held on the training device.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qtrain.data import source
from qtrain.data.cache import fingerprint, load_or_make
from qtrain.data.resident import Arrays, ResidentData, no_images


@dataclass(kw_only=True, eq=False, repr=False)
class HubImages(ResidentData):
    """A dataset of equally large images, from ``root`` (a folder of parquet files) or else from ``hub`` by name.

    ``image_column`` and ``label_column`` are needed only where the types leave a choice. ``cache_dir`` holds the
    decoded images, by default below ``~/.cache/qtrain/data``.
    """

    hub: str | None = None
    root: str | None = None
    train_split: str = "train"
    test_split: str = "test"
    image_column: str | None = None
    label_column: str | None = None
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hub is None and self.root is None:
            raise ValueError(f"{self.name}: give data.root=<folder of parquet files> or data.hub=<name on the hub>")

    def _arrays(self) -> Arrays:
        if self._test_only:
            test = self._split(self.test_split)
            facts = int(test["num_classes"]), tuple(map(str, test["classes"]))
            return Arrays(*no_images(test["images"]), test["images"], test["targets"], *facts)
        train = self._split(self.train_split)
        test = self._split(self.test_split)
        if train["images"].shape[1:] != test["images"].shape[1:]:
            raise ValueError(
                f"{self.name}: training and test images must have one shape, got {train['images'].shape[1:]} and "
                f"{test['images'].shape[1:]} (height, width, channels); use a streaming dataset for such data"
            )
        source.check_names(self.name, tuple(map(str, train["classes"])), tuple(map(str, test["classes"])))
        num_classes = max(int(train["num_classes"]), int(test["num_classes"]))
        names = tuple(map(str, train["classes"]))
        return Arrays(train["images"], train["targets"], test["images"], test["targets"], num_classes, names)

    def _split(self, split: str) -> dict[str, np.ndarray]:
        # The last word marks what is kept beside the images; another one makes older files be decoded anew.
        columns = (str(self.image_column), str(self.label_column), "classes")
        name = f"{self.name}-{split}"
        if self.root is not None:
            files = source.parquet_files(self.root, split)
            key = fingerprint(files, *columns)
            return load_or_make(name, key, lambda: self._decode(source.open_small(files), split), folder=self.cache_dir)
        rows = source.open_hub(str(self.hub), split)
        # Where the rows come from, with the version on the hub, and the files that they were prepared as. A table that
        # the library was told to hold in memory has no such files.
        files = [Path(file["filename"]) for file in rows.cache_files]
        key = fingerprint(files, str(self.hub), str(len(rows)), repr(rows.info.download_checksums), *columns)
        return load_or_make(name, key, lambda: self._decode(rows, split), folder=self.cache_dir)

    def _decode(self, rows: source.Rows, split: str) -> dict[str, np.ndarray]:
        where = f"{self.name} ({split})"
        labeled = source.find_columns(rows, image=self.image_column, label=self.label_column, where=where)
        targets = source.targets_of(labeled, where)
        num_classes = labeled.num_classes or int(targets.max()) + 1
        return {
            "images": source.decode_images(labeled, where),
            "targets": targets,
            "num_classes": np.asarray(num_classes),
            "classes": np.asarray(labeled.classes, dtype=np.str_),
        }
