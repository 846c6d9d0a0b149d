"""The names of the classes reach the facts of the data, for every kind of source that has them."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from qtrain.data.digits import Digits
from qtrain.data.folder import ImageFolder
from qtrain.data.hub import HubImages
from qtrain.data.parquet import ParquetImages

datasets = pytest.importorskip("datasets")


def picture(shade: int) -> Image.Image:
    return Image.new("RGB", (8, 8), (shade, 0, 0))


def encoded(shade: int) -> dict[str, bytes]:
    file = io.BytesIO()
    picture(shade).save(file, "PNG")
    return {"bytes": file.getvalue()}


def write_parquet(folder: Path) -> None:
    names = datasets.ClassLabel(names=["cat", "dog"])
    features = datasets.Features({"image": datasets.Image(), "label": names})
    rows = {"image": [encoded(shade) for shade in range(0, 120, 10)], "label": [0, 1] * 6}
    for split in ("train", "test"):
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}-0.parquet")


def test_digits_are_named_by_their_figure() -> None:
    data = Digits()
    data.setup()
    assert data.info.classes == tuple("0123456789")


@pytest.mark.parametrize("test_only", [False, True])
def test_names_come_from_the_label_column(tmp_path: Path, test_only: bool) -> None:
    write_parquet(tmp_path)
    for kind, options in ((HubImages, {"cache_dir": str(tmp_path / "cache")}), (ParquetImages, {"test_split": "test"})):
        data = kind(name="pets", root=str(tmp_path), batch_size=4, mean=[0.5] * 3, std=[0.5] * 3, **options)
        if test_only:
            data.test_only()
        data.setup()
        assert data.info.classes == ("cat", "dog")


def test_names_are_those_of_the_folders(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in ("dog", "cat"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for shade in range(4):
                picture(shade).save(folder / f"{shade}.png")
    data = ImageFolder(name="pets", root=str(tmp_path), test_folder="test", batch_size=4, image_size=8)
    data.setup()
    assert data.info.classes == ("cat", "dog")
