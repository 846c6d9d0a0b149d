"""What training images depend on: the identity changes with each of it, and with nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qtrain.data.digits import Digits
from qtrain.data.folder import ImageFolder


def digits(**options: Any) -> Digits:
    data = Digits(**{"crop_padding": 1, "flip": True, **options})
    data.setup()
    return data


def images(data: Any, epoch: int = 1) -> dict[int, torch.Tensor]:
    """The epoch's training images by sample."""
    loader = data.train_dataloader()
    loader.set_epoch(epoch)
    return {int(i): image for batch in loader for i, image in zip(batch.index, batch.image, strict=True)}


def equal_where_both_are(a: dict[int, torch.Tensor], b: dict[int, torch.Tensor]) -> bool:
    common = a.keys() & b.keys()
    assert len(common) > 10
    return all(torch.equal(a[i], b[i]) for i in common)


@pytest.mark.parametrize(
    "options",
    [{"seed": 1}, {"crop_padding": 2}, {"flip": False}, {"mixup": 0.4}, {"cutmix": 1.0}, {"mean": [0.5], "std": [0.5]}],
    ids=lambda options: "-".join(options),
)
def test_options_that_change_images_change_the_identity(options: dict[str, Any]) -> None:
    assert not equal_where_both_are(images(digits()), images(digits(**options)))
    assert digits().identity() != digits(**options).identity()


@pytest.mark.parametrize("mixing", [{}, {"mixup": 0.4}, {"cutmix": 1.0}], ids=["plain", "mixup", "cutmix"])
@pytest.mark.parametrize("options", [{"batch_size": 32}, {"eval_batch_size": 7}, {"max_test": 50}])
def test_other_options_keep_the_identity(options: dict[str, Any], mixing: dict[str, Any]) -> None:
    assert equal_where_both_are(images(digits(**mixing)), images(digits(**mixing, **options)))
    assert digits(**mixing).identity() == digits(**mixing, **options).identity()


@pytest.mark.parametrize("options", [{"max_train": 800}, {"val_fraction": 0.3}])
def test_fewer_samples_matter_where_images_mix(options: dict[str, Any]) -> None:
    assert equal_where_both_are(images(digits()), images(digits(**options)))
    assert digits().identity() == digits(**options).identity()
    assert not equal_where_both_are(images(digits(mixup=0.4)), images(digits(mixup=0.4, **options)))
    assert digits(mixup=0.4).identity() != digits(mixup=0.4, **options).identity()


def test_one_changed_pixel_changes_the_identity() -> None:
    other = digits()
    changed = other._decoded.train_images.copy()
    changed[700, 3, 3] ^= 1
    other._decoded = other._decoded._replace(train_images=changed)
    assert digits().identity() != other.identity()


def folder(root: Path, *, shade: int = 0) -> ImageFolder:
    for split in ("train", "val"):
        for label in range(2):
            (root / split / str(label)).mkdir(parents=True, exist_ok=True)
            for number in range(3):
                pixels = np.full((8, 8, 3), 10 * number + label + shade, dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / str(label) / f"{number}.png")
    data = ImageFolder(name="shades", root=str(root), batch_size=2, image_size=8, workers=0)
    data.setup()
    return data


def test_changed_streaming_image_changes_the_identity(tmp_path: Path) -> None:
    before = folder(tmp_path).identity()
    assert folder(tmp_path).identity() == before
    assert folder(tmp_path, shade=1).identity() != before, "the same names and labels, other pixels"


def test_identity_is_made_of_plain_values(tmp_path: Path) -> None:
    for data in (digits(mixup=0.1), folder(tmp_path)):
        assert json.loads(json.dumps(data.identity())) == data.identity()
