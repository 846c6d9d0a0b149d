"""Folders of images: their layout, gray and small ones, and what is wrong with one."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qtrain.data import image_set, source
from qtrain.data.folder import FolderImages, ImageFolder
from qtrain.data.image_set import ImageError
from qtrain.data.streaming import GRAY_MEAN, IMAGENET_MEAN

from .conftest import SIZE, picture

pytestmark = pytest.mark.usefixtures("cache")


def written(root: Path, *, gray: bool = False, size: tuple[int, int] = (SIZE, SIZE), count: int = 6) -> Path:
    """``count`` training and 4 test images of two classes, of the pixels of ``picture``."""
    for part, numbers in (("train", range(count)), ("val", range(100, 104))):
        for number in numbers:
            file = root / part / "ab"[number % 2] / f"{number:03d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture(number, gray=gray)).resize(size).save(file)
    return root


def folder(root: Path, **options: Any) -> ImageFolder:
    data = ImageFolder(name="tiny", root=str(root), **{"batch_size": 2, "workers": 0, **options})
    data.setup()
    return data


def test_small_images_keep_their_size_and_all_of_them_is_evaluated(tmp_path: Path) -> None:
    data = folder(written(tmp_path), mean=(0.0,) * 3, std=(1.0,) * 3)
    assert (data.info.image_size, data.info.in_channels) == (SIZE, 3)
    (image,) = [batch.image for batch in data.test_dataloader()]
    expected = np.stack([picture(number) for number in (100, 102, 101, 103)])
    assert np.array_equal((image * 255).round().byte().permute(0, 2, 3, 1).numpy(), expected)


def test_small_images_are_padded_and_cropped_by_default(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "qtrain"):
        data = folder(written(tmp_path), mean=(0.0,) * 3, std=(1.0,) * 3, crop_padding=1, flip=False)
    assert "tiny: small images, 12x12: 12x12, crop=pad by 1 pixels, flip=false, channels=3" in caplog.text
    order = [0, 2, 4, 1, 3, 5]
    for batch in data.train_dataloader():
        for number, image in zip(batch.index.tolist(), batch.image, strict=True):
            padded = np.pad(picture(order[number]), ((1, 1), (1, 1), (0, 0)))
            windows = [padded[row : row + SIZE, column : column + SIZE] for row in range(3) for column in range(3)]
            pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
            assert sum(np.array_equal(pixels, window) for window in windows) == 1


def test_large_images_are_224_pixels_and_resized_at_random(tmp_path: Path) -> None:
    data = folder(written(tmp_path, size=(80, 80), count=2))
    assert data.info.image_size == 224 and data.info.mean == IMAGENET_MEAN
    assert data._view.crop == "random_resized" and data._view.crop_pct == 0.875 and data._view.flip


@pytest.mark.parametrize("size", [(SIZE, SIZE), (80, 60)])
def test_gray_folder_has_one_channel(tmp_path: Path, size: tuple[int, int]) -> None:
    data = folder(written(tmp_path, gray=True, size=size), image_size=SIZE)
    assert data.info.in_channels == 1 and data.info.mean == GRAY_MEAN == pytest.approx([0.449], abs=1e-6)
    assert next(iter(data.train_dataloader())).image.shape == (2, 1, SIZE, SIZE)
    assert data._view.flip == (size != (SIZE, SIZE)), "small gray images are mostly symbols"


@pytest.mark.parametrize(
    ("gray", "options", "channels"),
    [
        (True, {"channels": 3}, 3),
        (False, {"channels": 1}, 1),
        (True, {"mean": (0.5,) * 3, "std": (0.2,) * 3}, 3),
        (False, {"mean": (0.5,), "std": (0.2,)}, 1),
    ],
)
def test_channels_and_mean_decide_over_the_images(
    tmp_path: Path, gray: bool, options: dict[str, Any], channels: int
) -> None:
    data = folder(written(tmp_path, gray=gray), **options)
    assert data.info.in_channels == len(data.info.mean) == channels
    assert next(iter(data.train_dataloader())).image.shape[1] == channels


def test_one_colored_image_makes_three_channels(tmp_path: Path) -> None:
    root = written(tmp_path, gray=True)
    Image.fromarray(picture(1)).save(root / "val" / "a" / "100.png")
    assert folder(root).info.in_channels == 3


def test_a_colored_image_among_gray_ones_that_was_not_looked_at_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_set, "SAMPLED", 2)
    root = written(tmp_path, gray=True)
    Image.fromarray(picture(1)).save(root / "train" / "a" / "002.png")
    with pytest.raises(ImageError, match=r"train/a/002\.png: is in color, but .* gray; say data\.channels=3, or"):
        list(folder(root).train_dataloader())
    assert len(list(folder(root, channels=1).train_dataloader())) == 3


def test_folder_without_an_image_is_named_in_both_parts(tmp_path: Path) -> None:
    root = written(tmp_path)
    (root / "train" / "c").mkdir()
    (root / "val" / "c").mkdir()
    (root / "val" / "c" / "notes.txt").write_text("no image")
    message = "{} must hold one folder of images for each class, and 1 have no image: c; remove them, or add images"
    with pytest.raises(FileNotFoundError, match=message.format("train")):
        folder(root)
    Image.fromarray(picture(1)).save(root / "train" / "c" / "0.png")
    with pytest.raises(FileNotFoundError, match=message.format("val")):
        folder(root)


def test_hidden_files_and_folders_are_left_out(tmp_path: Path) -> None:
    root = written(tmp_path)
    for place in ("a/._000.png", "a/.thumbnails/000.png", ".ipynb_checkpoints/000.png"):
        (root / "train" / place).parent.mkdir(exist_ok=True)
        (root / "train" / place).write_bytes(b"no image")
    data = folder(root, check=True)
    assert (data.info.num_classes, data.info.train_size) == (2, 6)


def test_images_of_subfolders_belong_to_the_class_in_the_order_of_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    walk = os.walk
    monkeypatch.setattr(os, "walk", lambda *given, **options: reversed(list(walk(*given, **options))))
    for name in ("b/2.png", "a/x/1.JPG", "a/9.png", "a/10.png", "a/w/3.jpeg", "a/readme.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    images = FolderImages(tmp_path, option="data.train_folder")
    files = [images.where(number).removeprefix(f"{tmp_path}/") for number in range(len(images))]
    assert files == ["a/10.png", "a/9.png", "a/w/3.jpeg", "a/x/1.JPG", "b/2.png"]
    assert [images.target(number) for number in range(len(images))] == [0, 0, 0, 0, 1]


def test_other_names_of_the_parts_are_suggested(tmp_path: Path) -> None:
    root = written(tmp_path)
    (root / "val").rename(root / "test")
    with pytest.raises(FileNotFoundError, match=r"no folder .*/val; .* has test, train: say data\.test_folder=<one"):
        folder(root)
    assert folder(root, test_folder="test").info.test_size == 4


def test_resident_sets_name_imagefolder_for_image_files(tmp_path: Path) -> None:
    written(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no train\*\.parquet in .*; image files are read by data=imagefolder"):
        source.parquet_files(str(tmp_path), "train")
    (tmp_path / "other").mkdir()
    with pytest.raises(FileNotFoundError, match=r"found nothing\); check the folder and split"):
        source.parquet_files(str(tmp_path / "other"), "train")


def test_mixed_modes_of_one_folder_make_one_batch(tmp_path: Path) -> None:
    root = written(tmp_path)
    for number, mode in enumerate(["L", "RGBA", "P", "CMYK", "1", "LA"]):
        image = Image.fromarray(picture(number)).convert(mode)
        (root / "train" / "ab"[number % 2] / f"{number:03d}.png").unlink()
        image.save(root / "train" / "ab"[number % 2] / f"{number:03d}.tiff")
    Image.fromarray(np.full((SIZE, SIZE), 257 * 9, dtype=np.uint16)).save(root / "train" / "a" / "900.png")
    data = folder(root, mean=(0.0,) * 3, std=(1.0,) * 3, crop="none", flip=False, batch_size=7)
    (batch,) = data.train_dataloader()
    assert batch.image.shape == (7, 3, SIZE, SIZE)
    sixteen_bits = batch.image[batch.index == 3]
    assert torch.equal((sixteen_bits * 255).round(), torch.full((1, 3, SIZE, SIZE), 9.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 2}, r"ImageFolder: channels must be 1 \(gray\) or 3 \(color\), got 2"),
        ({"crop_padding": -1}, "ImageFolder: crop_padding must be at least 0, got -1; in pixels"),
        ({"on_error": "ignore"}, "ImageFolder: on_error must be raise or skip, got 'ignore'"),
        ({"crop": "middle"}, "ImageFolder: crop must be one of random_resized, pad, none, got 'middle'"),
        ({"crop": "none", "crop_padding": 4}, "ImageFolder: crop_padding belongs to crop=pad, got crop=none"),
    ],
)
def test_wrong_options_give_a_one_line_error(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        folder(tmp_path, **options)


def test_options_of_the_crop_are_in_the_identity_and_those_of_the_check_are_not(tmp_path: Path) -> None:
    root = written(tmp_path)
    plain = folder(root).identity()
    for options in ({"crop": "none"}, {"crop_padding": 2}, {"flip": False}, {"crop_scale": (0.5, 1.0)}):
        assert folder(root, **options).identity() != plain
    assert folder(root, check=True, on_error="skip").identity() == plain
