"""Reading labeled images through the ``datasets`` library: from the hub by name, or from a folder of parquet files.

The only file that knows ``datasets``. Finds the columns by their types, because every publisher names
them differently (``img``, ``image``, ``label``, ``fine_label``).
"""

import io
import itertools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from qtrain.data.decode import read_image
from qtrain.data.image_set import REPAIR
from qtrain.models.hub import offline_unless_reachable
from qtrain.utils.errors import first_line

try:
    import datasets
    import pyarrow.parquet
    from datasets.table import InMemoryTable
except ImportError as error:
    raise ValueError(f"data: this dataset needs {error.name}; pip install 'qtrain[data]'") from error

Rows: TypeAlias = datasets.Dataset
"""A table of rows at random access; other files name the type without importing the library."""


class Labeled(NamedTuple):
    """A split with its image and label columns named.

    Where the labels carry no names, ``num_classes`` is ``None`` and ``classes`` is empty.
    """

    rows: datasets.Dataset
    image: str
    label: str
    num_classes: int | None
    classes: tuple[str, ...] = ()


def parquet_files(root: str, split: str) -> list[Path]:
    """The files ``<split>*.parquet`` of a folder, or of its subfolder ``data``, in the order of their names."""
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"data.root: there is no folder {folder}; give one that holds train-*.parquet and test-*.parquet"
        )
    for place in (folder, folder / "data"):
        files = sorted(place.glob(f"{split}*.parquet"))
        if files:
            return files
    found = ", ".join(sorted(p.name for p in folder.iterdir())[:5]) or "nothing"
    remedy = "image files are read by data=imagefolder" if _has_image_files(folder) else "check the folder and split"
    raise FileNotFoundError(f"data.root: no {split}*.parquet in {folder} (found {found}); {remedy}")


def _has_image_files(folder: Path) -> bool:
    """Whether there is an image among the first files below ``folder``."""
    return any(path.suffix.lower() in IMG_EXTENSIONS for path in itertools.islice(folder.rglob("*"), 1000))


def open_small(files: list[Path]) -> datasets.Dataset:
    """Parquet files read into memory, without a copy on disk."""
    try:
        tables = [pyarrow.parquet.read_table(file) for file in files]
        return datasets.concatenate_datasets([datasets.Dataset(InMemoryTable(table)) for table in tables])
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"data.root: cannot read {files[0].parent} as parquet ({first_line(error)})") from error


def open_large(files: list[Path], cache_dir: str | None) -> datasets.Dataset:
    """Parquet files as an Arrow file that is mapped into memory: random access at the price of a copy on disk.

    The copy is made once, by ``datasets``, in its own cache or ``cache_dir``.
    """
    try:
        loaded = datasets.load_dataset(
            "parquet", data_files={"rows": [str(f) for f in files]}, split="rows", cache_dir=cache_dir
        )
    except (datasets.exceptions.DatasetGenerationError, pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"data.root: cannot read {files[0].parent} as parquet ({first_line(error)})") from error
    assert isinstance(loaded, datasets.Dataset)
    return loaded


def open_hub(hub: str, split: str) -> datasets.Dataset:
    """A split of a dataset of the Hugging Face hub, downloaded once into the library's own cache."""
    try:
        with offline_unless_reachable(datasets.config):
            loaded = datasets.load_dataset(hub, split=split)
    except ValueError as error:
        raise ValueError(f"data.hub: cannot load split {split!r} of {hub!r}: {first_line(error)}") from error
    except Exception as error:  # the library raises whatever its HTTP client does
        raise FileNotFoundError(
            f"data.hub: cannot load {hub!r} from the hub ({first_line(error)}); without a network give "
            "data.root=<folder with train-*.parquet and test-*.parquet>"
        ) from error
    assert isinstance(loaded, datasets.Dataset)
    return loaded


def find_columns(rows: datasets.Dataset, *, image: str | None, label: str | None, where: str) -> Labeled:
    """Name the image and the label column by their types, unless they are given.

    An image is a column of type Image, or of binary ``bytes`` as image writers without the library store them. A
    label is a ClassLabel, or the only integer column. CIFAR-100 has two ClassLabels: ``label`` decides.
    """
    features = rows.features
    for option, name in (("image_column", image), ("label_column", label)):
        if name is not None and name not in features:
            raise ValueError(f"data.{option}: {where} has no column {name!r}; it has {', '.join(features)}")
    if image is None:
        image = _only([n for n, f in features.items() if _is_image(f)], list(features), "image", where)
    if label is None:
        named = [n for n, f in features.items() if isinstance(f, datasets.ClassLabel)]
        numbers = [n for n, f in features.items() if isinstance(f, datasets.Value) and "int" in f.dtype]
        label = _only(named or numbers, list(features), "label", where)
    if not isinstance(features[image], datasets.Image):
        rows = rows.cast_column(image, datasets.Image())
    feature = features[label]
    names = tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else ()
    return Labeled(rows.select_columns([image, label]), image, label, len(names) or None, names)


def check_names(name: str, train: Sequence[str], test: Sequence[str]) -> None:
    """Raise ``ValueError`` where training and test images name their classes, and not alike in the same order."""
    if train and test and list(train) != list(test):
        place = next(n for n, (one, other) in enumerate(itertools.zip_longest(train, test)) if one != other)
        one, other = (repr(names[place]) if place < len(names) else "not there" for names in (train, test))
        raise ValueError(
            f"{name}: class {place} is {one} among the training images and {other} among the test images; give both "
            "the same classes in the same order"
        )


def targets_of(split: Labeled, where: str) -> np.ndarray:
    """All labels as (D,) int64, without decoding an image; none may be missing or out of range."""
    labels = split.rows.data.column(split.label)
    if not len(labels):
        raise ValueError(f"{where}: there are no rows")
    targets = labels.to_numpy().astype(np.int64) if not labels.null_count else np.array([-1])
    limit = split.num_classes or int(targets.max()) + 1
    if targets.min() < 0 or targets.max() >= limit:
        raise ValueError(
            f"{where}: labels must be in 0..{limit - 1}, got {targets.min()}..{targets.max()} or none (published test "
            "sets often hide theirs); choose a labeled split"
        )
    return targets


def encoded(split: Labeled) -> Rows:
    """The rows with images as they are stored: a dict of ``bytes`` and ``path``."""
    return split.rows.cast_column(split.image, datasets.Image(decode=False))


def decode_images(split: Labeled, where: str) -> np.ndarray:
    """All images as (D, H, W, C) uint8, one channel where every image is gray, else three."""
    rows = encoded(split)

    def one(number: int) -> np.ndarray:
        return decode_image(rows[number][split.image], f"{where} image {number}")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        images = list(pool.map(one, range(len(rows))))
    sizes = {image.shape[:2] for image in images}
    if len(sizes) > 1:
        raise ValueError(
            f"{where}: resident images must all have one size, got {sorted(sizes)[:3]}; use data=parquet, which resizes"
        )
    channels = max(image.shape[2] for image in images)
    return np.stack([np.broadcast_to(image, (*image.shape[:2], channels)) for image in images])


def decode_image(stored: dict[str, bytes | str | None], where: str) -> np.ndarray:
    """One stored image (its ``bytes``, or the file at its ``path``) as (H, W, 1 or 3) uint8."""
    pixels = np.asarray(open_image(stored, where))
    return pixels if pixels.ndim == 3 else pixels[..., None]


def open_image(stored: dict[str, bytes | str | None], where: str, *, remedy: str = REPAIR) -> Image.Image:
    """One stored image (its ``bytes``, or the file at its ``path``), as ``qtrain.data.decode`` does."""
    content, path = stored.get("bytes"), stored.get("path")
    return read_image(io.BytesIO(content) if isinstance(content, bytes) else str(path), where, remedy=remedy)


def _is_image(feature: object) -> bool:
    if isinstance(feature, dict):
        return isinstance(inner := feature.get("bytes"), datasets.Value) and inner.dtype.endswith("binary")
    return isinstance(feature, datasets.Image)


def _only(candidates: list[str], columns: list[str], what: str, where: str) -> str:
    if len(candidates) == 1:
        return candidates[0]
    found = ", ".join(candidates) if candidates else "none"
    raise ValueError(
        f"data.{what}_column: {where} must have one {what} column, found {found} among {', '.join(columns)}; "
        f"say data.{what}_column=<name>"
    )
