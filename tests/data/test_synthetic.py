"""Synthetic images in place of training images, and data sets that leave their training images where they are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from qtrain.data.base import VisionData
from qtrain.data.digits import Digits
from qtrain.data.folder import ImageFolder
from qtrain.data.hub import HubImages
from qtrain.data.parquet import ParquetImages
from qtrain.data.synthetic import SyntheticImages
from qtrain.data.synthetic_store import (
    IMAGES_MANIFEST,
    Manifest,
    read_manifest,
    read_shard,
    shard_path,
    write_manifest,
    write_shard,
)

GRAY = {"mean": [0.5], "std": [0.25]}
RGB = {"mean": [0.5] * 3, "std": [0.25] * 3}


def images(number: int, count: int = 6, size: int = 8, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (count, size, size, channels), dtype=np.uint8)


def folder_of(path: Path, batches: int = 2, channels: int = 1) -> Manifest:
    for number in range(batches):
        write_shard(
            shard_path(path, number, batches), images(number, channels=channels), np.arange(6) % 3, {"loss": number + 1}
        )
    shards = [shard for n in range(batches) if (shard := read_shard(shard_path(path, n, batches))) is not None]
    return write_manifest(path, {"method": "by hand"}, shards)


def synthetic(folder: Path | None, **options: object) -> SyntheticImages:
    given = {"name": "made", "num_classes": 3, "image_size": 8, "in_channels": 1, "batch_size": 4, **GRAY, **options}
    return SyntheticImages(folder=None if folder is None else str(folder), **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("channels", [1, 3])
def test_written_images_are_read_back_exactly(tmp_path: Path, channels: int) -> None:
    folder_of(tmp_path, channels=channels)
    statistics = GRAY if channels == 1 else RGB
    data = synthetic(tmp_path, in_channels=channels, **statistics)
    data.setup()
    wanted = torch.from_numpy(np.concatenate([images(n, channels=channels) for n in (0, 1)])).permute(0, 3, 1, 2)
    batches = data.calibration_batches(3)
    assert sorted(torch.cat([batch.index for batch in batches]).tolist()) == list(range(12))
    for batch in batches:
        assert torch.equal((batch.image * 0.25 + 0.5).mul(255).round().byte(), wanted[batch.index])
        assert torch.equal(batch.target, batch.index % 6 % 3)
    assert data.info.train_size == 12
    assert len(data.train_dataloader()) == 3


def test_the_manifest_says_what_was_reached_and_tells_folders_apart(tmp_path: Path) -> None:
    one, two = folder_of(tmp_path / "one"), folder_of(tmp_path / "two")
    other = folder_of(tmp_path / "other", batches=3)
    assert one.metrics == {"images": 12, "loss": 1.5}
    assert one.identity == two.identity != other.identity
    assert read_manifest(tmp_path / "one") == one


def test_test_images_are_those_of_the_real_set(tmp_path: Path) -> None:
    folder_of(tmp_path)
    real = Digits(max_test=20, mean=GRAY["mean"], std=GRAY["std"])
    data = synthetic(tmp_path, num_classes=10, test=real)
    data.setup()
    alone = Digits(max_test=20, mean=GRAY["mean"], std=GRAY["std"])
    alone.setup()
    (ours,), (theirs,) = list(data.test_dataloader()), list(alone.test_dataloader())
    assert torch.equal(ours.image, theirs.image)
    assert real.info.train_size == 0


def test_identity_depends_only_on_synthetic_images(tmp_path: Path) -> None:
    folder_of(tmp_path)
    with_test = synthetic(tmp_path, num_classes=10, test=Digits(max_test=20, mean=GRAY["mean"], std=GRAY["std"]))
    alone = synthetic(tmp_path, num_classes=10)
    for data in (with_test, alone):
        data.setup()
    assert json.dumps(with_test.identity(), sort_keys=True) == json.dumps(alone.identity(), sort_keys=True)


def test_without_real_images_nothing_is_tested(tmp_path: Path) -> None:
    folder_of(tmp_path)
    data = synthetic(tmp_path)
    data.setup()
    assert data.info.test_size == 0
    with pytest.raises(ValueError, match=r"there are no test images; set fit.final_test=false to run without"):
        data.test_dataloader()


@pytest.mark.parametrize("kind", [HubImages, ParquetImages])
def test_parquet_without_its_training_files(parquet_root: Path, tmp_path: Path, kind: type[VisionData]) -> None:
    for file in parquet_root.glob("train*"):
        file.unlink()
    options = {"root": str(parquet_root), "test_split": "test", "cache_dir": str(tmp_path / "cache"), **RGB}
    options |= {"workers": 0} if kind is ParquetImages else {}
    data = kind(name="set", **options)  # type: ignore[arg-type]
    data.test_only()
    check_test_only(data, 20)
    assert data.info.classes == ("class0", "class1", "class2")


def test_folders_without_the_training_folder(folder_root: Path) -> None:
    (folder_root / "train").rename(folder_root / "elsewhere")
    data = ImageFolder(name="set", root=str(folder_root), image_size=12, workers=0)
    data.test_only()
    check_test_only(data, 8)


def test_real_test_images_say_how_classes_are_called_and_images_cut(folder_root: Path) -> None:
    seen = {"image_size": 12, "crop_pct": 0.5, "interpolation": "box"}
    real = ImageFolder(name="set", root=str(folder_root), workers=0, **seen, **RGB)  # type: ignore[arg-type]
    data = synthetic(None, num_classes=2, image_size=12, in_channels=3, test=real, **RGB)
    data.setup()
    assert (data.info.classes, data.info.crop_pct, data.info.interpolation) == (("class0", "class1"), 0.5, "box")


def check_test_only(data: VisionData, test_size: int) -> None:
    data.setup()
    assert (data.info.train_size, data.info.test_size) == (0, test_size)
    assert sum(len(batch.target) for batch in data.test_dataloader()) == test_size
    for use in (data.train_dataloader, lambda: data.calibration_batches(1)):
        with pytest.raises(ValueError, match=r"needs training images and there are none; .*data=synthetic"):
            use()


def test_mean_and_std_are_required_without_training_images() -> None:
    data = Digits()
    data.test_only()
    with pytest.raises(ValueError, match=r"digits: mean and std are computed from the training images.*data.mean"):
        data.setup()


def test_mismatch_with_the_config_is_named(tmp_path: Path) -> None:
    folder_of(tmp_path)
    for options, message in (
        ({"image_size": 9}, r"the images in .* are \(8, 8, 1\) \(height, width, channels\), not \(9, 9, 1\)"),
        ({"num_classes": 2}, "have labels up to 2, but data.num_classes is 2"),
        ({"num_classes": 10, "test": Digits(mean=[0.4], std=[0.25])}, "data.test: mean and std must be those of data"),
        ({"num_classes": 10, "test": Digits(mean=[0.5], std=[0.3])}, "data.test: mean and std must be those of data"),
    ):
        with pytest.raises(ValueError, match=message):
            synthetic(tmp_path, **options).setup()
    with pytest.raises(ValueError, match="SyntheticImages: mean and std are needed"):
        synthetic(tmp_path, mean=None, std=None)


@pytest.mark.parametrize("damage", ["", "{", json.dumps({"format": 2}), json.dumps({"format": 1}), "[]"])
def test_a_damaged_manifest_is_named(tmp_path: Path, damage: str) -> None:
    folder_of(tmp_path)
    (tmp_path / IMAGES_MANIFEST).write_text(damage)
    with pytest.raises(ValueError, match=r"data.folder: .*manifest.json is no manifest of synthesized images"):
        synthetic(tmp_path).setup()


def test_a_batch_that_is_absent_is_named(tmp_path: Path) -> None:
    folder_of(tmp_path)
    shard_path(tmp_path, 1, 2).unlink()
    with pytest.raises(ValueError, match=r"images-00001-of-00002.parquet is missing; delete it and .*manifest.json"):
        synthetic(tmp_path).setup()
