"""Synthetic images on disk: parquet files, one for each batch, and a manifest that says what they are.

    images-00007-of-00040.parquet   columns ``image`` (PNG bytes) and ``label``, as data sets on the hub have them
    manifest.json                   what they were made from, what was reached, and the SHA-256 of each file

The manifest appears when all files are there; without it the folder holds the beginning of a synthesis, which
goes on where it stopped.
"""

import hashlib
import io
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from qtrain.utils.atomic_write import atomic_write, write_text
from qtrain.utils.digest import file_digest

log = logging.getLogger(__name__)

IMAGES_MANIFEST = "manifest.json"
IMAGES_FORMAT = 1


class Shard(NamedTuple):
    """A batch as it was kept: its file, how many images it has, and what was reached."""

    path: Path
    images: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class Manifest:
    """What a finished folder says of itself: ``made_from`` (models, method, seed), metrics, and the files' hashes."""

    folder: Path
    made_from: Mapping[str, Any]
    metrics: Mapping[str, float]
    files: Mapping[str, str]

    @property
    def identity(self) -> str:
        """A hash of all images: two folders with the same one hold the same."""
        return hashlib.sha256(json.dumps(dict(self.files), sort_keys=True).encode()).hexdigest()

    def checked_files(self) -> list[Path]:
        """The files in order. Raises ``ValueError`` where one is absent or was changed."""
        paths = []
        for name, digest in self.files.items():
            path = self.folder / name
            if not path.is_file() or file_digest(path) != digest:
                what = "is damaged" if path.is_file() else "is missing"
                raise ValueError(
                    f"data.folder: {path} {what}; delete it and {self.folder / IMAGES_MANIFEST}, "
                    "and task=synthesize makes it anew"
                )
            paths.append(path)
        return paths


def shard_path(folder: Path, number: int, batches: int) -> Path:
    """Where batch ``number`` of ``batches`` lies."""
    return folder / f"images-{number:05d}-of-{batches:05d}.parquet"


def write_shard(path: Path, images: np.ndarray, labels: np.ndarray, metrics: Mapping[str, float]) -> None:
    """Keep ``images`` (N, H, W, C) uint8 without loss, ``labels`` (N,) and ``metrics``, as one file."""
    pyarrow = _pyarrow()
    rows = {
        "image": [{"bytes": _png(image), "path": None} for image in images],
        "label": pyarrow.array(labels, pyarrow.int64()),
    }
    image_type = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    schema = pyarrow.schema([("image", image_type), ("label", pyarrow.int64())])
    table = pyarrow.table(rows, schema=schema).replace_schema_metadata({"metrics": json.dumps(dict(metrics))})
    with atomic_write(path) as temporary:
        pyarrow.parquet.write_table(table, temporary)


def read_shard(path: Path) -> Shard | None:
    """What is known of a kept batch; ``None`` where the file is not there, or is damaged and therefore removed."""
    if not path.is_file():
        return None
    pyarrow = _pyarrow()
    try:
        table = pyarrow.parquet.read_table(path)
        metrics = json.loads(table.schema.metadata[b"metrics"])
    except (pyarrow.ArrowInvalid, OSError, KeyError, TypeError, ValueError) as error:
        log.warning("%s is damaged (%s); it is made anew", path, str(error).partition("\n")[0])
        path.unlink(missing_ok=True)
        return None
    return Shard(path, table.num_rows, metrics)


def read_images(path: Path, count: int) -> np.ndarray:
    """The first ``count`` images of a kept batch (N, H, W, C) uint8."""
    column = _pyarrow().parquet.read_table(path, columns=["image"])["image"].to_pylist()[:count]
    images = [np.asarray(Image.open(io.BytesIO(row["bytes"]))) for row in column]
    return np.stack([image if image.ndim == 3 else image[..., None] for image in images])


def write_manifest(folder: Path, made_from: Mapping[str, Any], shards: list[Shard]) -> Manifest:
    """Mark ``folder`` as complete. Metrics are means over images."""
    total = sum(shard.images for shard in shards)
    names = sorted({name for shard in shards for name in shard.metrics})
    metrics = {name: sum(s.metrics.get(name, float("nan")) * s.images for s in shards) / total for name in names}
    files = {shard.path.name: file_digest(shard.path) for shard in shards}
    manifest = Manifest(folder, made_from, {"images": total, **metrics}, files)
    content = {"format": IMAGES_FORMAT, "made_from": dict(made_from), "metrics": dict(manifest.metrics), "files": files}
    write_text(folder / IMAGES_MANIFEST, json.dumps(content, indent=1) + "\n")
    return manifest


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of a finished folder. Raises ``FileNotFoundError`` or ``ValueError`` with the remedy."""
    path = Path(folder).expanduser() / IMAGES_MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"data.folder: there is no {path}; give a folder that task=synthesize has finished, or the same command "
            "again to finish it"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != IMAGES_FORMAT:
            raise ValueError(f"its format is {content['format']}, this version reads {IMAGES_FORMAT}")
        return Manifest(path.parent, content["made_from"], content["metrics"], content["files"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"data.folder: {path} is no manifest of synthesized images ({error}); delete it") from error


def _pyarrow() -> Any:
    """Import the library only if a run needs it: it is an extra, and most runs have no synthetic images."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"data: synthetic images need {error.name}; pip install 'qtrain[data]'") from error
    return pyarrow


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(buffer, format="PNG")
    return buffer.getvalue()
