"""timm's transforms through the one function that data loading calls."""

from __future__ import annotations

import pickle
import random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qtrain.models.transforms import create_transform

NORMAL = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3)}


def picture(mode: str = "RGB", size: tuple[int, int] = (70, 50)) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def test_evaluation_by_hand() -> None:
    flat = Image.new("RGB", (70, 50), (255, 0, 51))
    x = create_transform(image_size=32, train=False, **NORMAL)(flat)
    expected = [(1.0 - 0.5) / 0.2, (0.0 - 0.4) / 0.25, (0.2 - 0.3) / 0.3]
    torch.testing.assert_close(x, torch.tensor(expected).view(3, 1, 1).expand(3, 32, 32))


def test_evaluation_crops_the_center() -> None:
    image = picture(size=(32, 32))
    x = create_transform(image_size=16, train=False, mean=(0.0,) * 3, std=(1.0,) * 3, crop_pct=0.5)(image)
    assert torch.equal(x, torch.from_numpy(np.asarray(image)[8:24, 8:24] / np.float32(255)).permute(2, 0, 1))


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK", "1"])
@pytest.mark.parametrize("train", [True, False])
def test_every_mode_gives_the_channels_of_mean(mode: str, train: bool) -> None:
    color = create_transform(image_size=24, train=train, **NORMAL)
    gray = create_transform(image_size=24, train=train, mean=(0.5,), std=(0.2,))
    assert color(picture(mode)).shape == (3, 24, 24)
    assert gray(picture(mode)).shape == (1, 24, 24)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 0.5},
        {"auto_augment": "original"},
        {"auto_augment": "augmix-m5-w4-d2"},
        {"color_jitter": 0.4},
        {"interpolation": "random"},
    ],
)
def test_training_is_a_function_of_the_seeds(options: dict) -> None:
    transform = pickle.loads(pickle.dumps(create_transform(image_size=24, train=True, **NORMAL, **options)))

    def draw(seed: int) -> torch.Tensor:
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        return transform(picture())

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def drawn(image: Image.Image, count: int, **options: Any) -> list[np.ndarray]:
    """So many training images of a gray one, as bytes; the seeds are 0, 1, ..."""
    transform = create_transform(train=True, mean=(0.0,), std=(1.0,), **options)
    found = []
    for seed in range(count):
        torch.manual_seed(seed)
        random.seed(seed)
        found.append((transform(image)[0] * 255).round().byte().numpy())
    return found


def test_padding_and_cropping_gives_windows_of_the_padded_image() -> None:
    image = Image.fromarray(np.arange(1, 65, dtype=np.uint8).reshape(8, 8))
    padded = np.pad(np.asarray(image), 2)
    windows = {padded[row : row + 8, column : column + 8].tobytes() for row in range(5) for column in range(5)}
    seen = {pixels.tobytes() for pixels in drawn(image, 60, image_size=8, crop="pad", crop_padding=2, flip=False)}
    assert seen <= windows and len(seen) > 15


def test_padding_and_cropping_moves_along_the_longer_side() -> None:
    image = Image.fromarray(np.tile(np.arange(16, dtype=np.uint8), (8, 1)))
    firsts = {int(pixels[0, 0]) for pixels in drawn(image, 60, image_size=8, crop="pad", crop_padding=0, flip=False)}
    assert firsts == set(range(9))


@pytest.mark.parametrize("crop", ["random_resized", "pad", "none"])
def test_flip_is_a_choice(crop: str) -> None:
    """Columns that rise from left to right fall only where the image is mirrored."""
    image = Image.fromarray(np.tile(np.arange(0, 240, 10, dtype=np.uint8), (24, 1)))
    for flip, expected in ((False, {True}), (True, {True, False})):
        images = drawn(image, 20, image_size=24, crop=crop, flip=flip)
        assert {bool(pixels[12, 20] > pixels[12, 4]) for pixels in images} == expected


def test_without_a_crop_training_images_are_those_of_evaluation() -> None:
    options = {"image_size": 24, **NORMAL}
    image = picture()
    plain = create_transform(train=False, **options)(image)
    assert torch.equal(create_transform(train=True, crop="none", flip=False, **options)(image), plain)


def test_crop_scale_bounds_the_share_of_the_area() -> None:
    """Almost all of a square is almost always all of it, as other shapes do not fit."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24), dtype=np.uint8))
    tight = {pixels.tobytes() for pixels in drawn(image, 10, image_size=24, crop_scale=(0.99, 1.0), flip=False)}
    loose = {pixels.tobytes() for pixels in drawn(image, 10, image_size=24, flip=False)}
    assert len(tight) < len(loose) == 10


def test_gray_images_take_policies_too() -> None:
    options = {"auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 0.5, "crop": "pad", "crop_padding": 3}
    assert len({pixels.tobytes() for pixels in drawn(picture("L"), 10, image_size=24, **options)}) == 10


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"image_size": 0}, "image_size must be at least 1 pixel, got 0"),
        ({"mean": (0.5, 0.5)}, "of one length, 1 or 3"),
        ({"std": (0.0, 1.0, 1.0)}, "std must be positive"),
        ({"re_prob": 1.5}, "re_prob must be in \\[0, 1\\], got 1.5"),
        ({"crop_pct": 0.0}, "crop_pct must be in \\(0, 1\\], got 0.0"),
        ({"interpolation": "cubic"}, "interpolation must be one of .*bicubic.* got 'cubic'"),
        ({"auto_augment": "rnad-m9"}, "timm has no auto_augment policy 'rnad-m9'"),
    ],
)
def test_wrong_options_are_refused(options: dict, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        create_transform(**({"image_size": 24, "train": True} | NORMAL | options))
