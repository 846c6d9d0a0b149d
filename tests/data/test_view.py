"""Which crop follows from which options and images."""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image

from qtrain.data.image_set import ImageSet, Looks, looks_of
from qtrain.data.view import SettledView, View

PHOTOGRAPHS = Looks(side=None, gray=False, colorless=False)
THUMBNAILS = Looks(side=32, gray=False, colorless=False)
DIGITS = Looks(side=28, gray=True, colorless=True)
DIGITS_IN_RGB = Looks(side=28, gray=False, colorless=True)
XRAYS = Looks(side=None, gray=True, colorless=True)

LARGE = {
    "image_size": 224, "crop": "random_resized", "crop_scale": (0.08, 1.0), "crop_padding": 28, "crop_pct": 0.875,
    "flip": True,
}  # fmt: skip
SMALL = {**LARGE, "image_size": 32, "crop": "pad", "crop_padding": 4, "crop_pct": 1.0}


@pytest.mark.parametrize(
    ("options", "looks", "expected"),
    [
        ({}, PHOTOGRAPHS, LARGE),
        ({}, XRAYS, LARGE),
        ({}, THUMBNAILS, SMALL),
        ({}, DIGITS, {**SMALL, "image_size": 28, "crop_padding": 3, "flip": False}),
        ({}, DIGITS_IN_RGB, {**SMALL, "image_size": 28, "crop_padding": 3, "flip": False}),
        ({"flip": True}, DIGITS, {**SMALL, "image_size": 28, "crop_padding": 3}),
        ({"flip": False}, PHOTOGRAPHS, {**LARGE, "flip": False}),
        ({"image_size": 224}, THUMBNAILS, {**SMALL, "image_size": 224, "crop_padding": 28}),
        ({"crop": "none"}, THUMBNAILS, {**SMALL, "crop": "none"}),
        ({"crop": "random_resized"}, THUMBNAILS, {**SMALL, "crop": "random_resized"}),
        ({"crop_scale": [0.5, 1]}, THUMBNAILS, {**SMALL, "crop": "random_resized", "crop_scale": (0.5, 1.0)}),
        ({"crop_padding": 8}, PHOTOGRAPHS, {**LARGE, "crop": "pad", "crop_padding": 8}),
        ({"crop_padding": 0}, THUMBNAILS, {**SMALL, "crop_padding": 0}),
        ({"crop_pct": 0.9}, THUMBNAILS, {**SMALL, "crop_pct": 0.9}),
    ],
)
def test_view_follows_from_options_and_then_from_the_images(
    options: dict[str, Any], looks: Looks, expected: dict[str, Any]
) -> None:
    assert View(**options).settled(looks) == SettledView(**expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop": "centre"}, "crop must be one of random_resized, pad, none, got 'centre'"),
        ({"crop_scale": [0.5]}, r"crop_scale must be two shares of the area, 0 < low <= high <= 1, got \[0.5\]"),
        ({"crop_scale": [0.0, 1.0]}, "crop_scale must be two shares"),
        ({"crop_scale": [0.9, 0.5]}, "crop_scale must be two shares"),
        ({"crop": "pad", "crop_scale": [0.5, 1.0]}, "crop_scale belongs to crop=random_resized, got crop=pad; leave"),
        ({"crop": "none", "crop_padding": 4}, "crop_padding belongs to crop=pad, got crop=none; leave"),
        ({"crop_padding": 4, "crop_scale": [0.5, 1.0]}, "give one of them"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        View(**options)


class Drawn(ImageSet):
    """Images of the given modes and sizes, black but for one pixel of each; counts how many were decoded."""

    num_classes = 2

    def __init__(self, *kinds: tuple[str, tuple[int, int]], color: str = "white") -> None:
        self.kinds, self.color, self.decoded = kinds, color, 0

    def __len__(self) -> int:
        return len(self.kinds)

    def image(self, number: int) -> Image.Image:
        self.decoded += 1
        mode, size = self.kinds[number]
        image = Image.new(mode, size)
        image.putpixel((0, 0), 255 if mode == "L" else Image.new("RGB", (1, 1), self.color).getpixel((0, 0)))
        return image

    def target(self, number: int) -> int:
        return number % 2

    def where(self, number: int) -> str:
        return str(number)

    def fingerprint(self) -> str:
        return "drawn"


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (Drawn(("L", (28, 28)), ("L", (28, 28))), Looks(28, True, True)),
        (Drawn(("RGB", (28, 28)), ("L", (28, 28))), Looks(28, False, True)),
        (Drawn(("L", (28, 28)), ("RGB", (28, 28)), color="red"), Looks(28, False, False)),
        (Drawn(("L", (28, 28)), ("L", (32, 32))), Looks(None, True, True)),
        (Drawn(("RGB", (64, 64)), color="red"), Looks(64, False, False)),
        (Drawn(("RGB", (65, 65)), color="red"), Looks(None, False, False)),
        (Drawn(("RGB", (32, 24)), color="red"), Looks(None, False, False)),
        (Drawn(), Looks(None, False, False)),
    ],
)
def test_looks_are_what_all_sampled_images_have_in_common(images: Drawn, expected: Looks) -> None:
    assert looks_of(images) == expected


def test_photographs_are_told_by_the_first_and_of_many_small_images_64_are_looked_at() -> None:
    photographs = Drawn(*[("RGB", (300, 200))] * 500, color="red")
    thumbnails = Drawn(*[("RGB", (32, 32))] * 500, color="red")
    assert looks_of(photographs).side is None and looks_of(thumbnails).side == 32
    assert (photographs.decoded, thumbnails.decoded) == (1, 64)
