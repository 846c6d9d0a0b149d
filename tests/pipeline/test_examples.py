"""Test images that a run keeps as pictures, with its models' answers."""

import base64
import io
import json
from pathlib import Path
from typing import final

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn

from qtrain.data.digits import Digits
from qtrain.pipeline.examples import COUNT, keep_examples, pictures, write_pictures
from qtrain.settings.run_files import EXAMPLES


@final
class Always(nn.Module):
    """Says the class ``number``."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def forward(self, x: Tensor) -> Tensor:
        return torch.eye(10)[self.number].expand(len(x), 10)


@pytest.fixture
def data() -> Digits:
    data = Digits(crop_padding=1)
    data.setup()
    return data


def test_pictures_are_the_images_of_the_data_set(data: Digits) -> None:
    """To the pixel: normalizing is undone."""
    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    known = {image.tobytes(): str(label) for image, label in zip(pixels, digits.target, strict=True)}
    found = list(pictures(data, 25))
    assert len(found) == 25
    assert all(known[np.asarray(one.image).tobytes()] == one.label for one in found)


def test_answers_of_each_model_are_kept(data: Digits, tmp_path: Path) -> None:
    keep_examples(tmp_path, data, {"three": Always(3), "seven": Always(7)}, torch.device("cpu"))
    found = json.loads((tmp_path / EXAMPLES).read_text())
    assert found["answers"] == {"three": ["3"] * COUNT, "seven": ["7"] * COUNT}
    targets = torch.cat([batch.target for batch in data.test_dataloader()])[:COUNT]
    assert found["labels"] == [str(number) for number in targets.tolist()]
    assert Image.open(io.BytesIO(base64.b64decode(found["images"][0]))).size == (8, 8)


def test_picture_files_tell_their_classes(data: Digits, tmp_path: Path) -> None:
    files = write_pictures(data, tmp_path / "images", 2)
    labels = [one.label for one in pictures(data, 2)]
    assert [file.name for file in files] == [f"{number}-label-{label}.png" for number, label in enumerate(labels)]
    assert Image.open(files[1]).size == (8, 8) and Image.open(files[1]).mode == "L"
