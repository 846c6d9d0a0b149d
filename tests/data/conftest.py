"""Tiny datasets on disk that the data tests share."""

from __future__ import annotations

import io
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from qtrain.data.cache import default_folder

SIZE = 12


def picture(number: int, gray: bool = False) -> np.ndarray:
    """A reproducible image: (SIZE, SIZE, 3) or (SIZE, SIZE) uint8."""
    shape = (SIZE, SIZE) if gray else (SIZE, SIZE, 3)
    return np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(
    path: Path, numbers: range, *, image: str = "img", label: str = "label", gray: bool = False, classes: int = 3
) -> None:
    """Images ``picture(number)`` with label number modulo ``classes``, as the datasets library writes them."""
    features = datasets.Features(
        {image: datasets.Image(), label: datasets.ClassLabel(names=[f"class{c}" for c in range(classes)])}
    )
    rows = {
        image: [{"bytes": png(picture(n, gray)), "path": None} for n in numbers],
        label: [n % classes for n in numbers],
    }
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of decoded and checked images is the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return default_folder()


@pytest.fixture
def parquet_root(tmp_path: Path) -> Path:
    """48 training images in two files and 20 test images."""
    root = tmp_path / "set"
    root.mkdir()
    write_parquet(root / "train-00000-of-00002.parquet", range(0, 30))
    write_parquet(root / "train-00001-of-00002.parquet", range(30, 48))
    write_parquet(root / "test-00000-of-00001.parquet", range(100, 120))
    return root


@pytest.fixture
def folder_root(tmp_path: Path) -> Path:
    """24 training and 8 test images in folders of two classes."""
    for part, numbers in (("train", range(24)), ("val", range(100, 108))):
        for number in numbers:
            file = tmp_path / "folder" / part / f"class{number % 2}" / f"{number:03d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(png(picture(number)))
    return tmp_path / "folder"
