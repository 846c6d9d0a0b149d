"""What each kind of image file becomes: 8-bit gray or color, upright, on white."""

from __future__ import annotations

import errno
import io
import pickle
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qtrain.data.decode import ORIENTATION, read_image, to_8_bits
from qtrain.data.image_set import UnreadableImageError

from .conftest import picture

Pixels = Any
UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored[::-1, ::-1].swapaxes(0, 1),
    8: lambda stored: np.rot90(stored),
}
"""EXIF orientation -> the image as it was seen, by NumPy."""


def decoded(image: Image.Image, format: str = "PNG", **options: Any) -> tuple[str, Pixels]:
    """Mode and pixels of ``image`` after it was written as a file and read again."""
    file = io.BytesIO()
    image.save(file, format, **options)
    file.seek(0)
    found = read_image(file, "it")
    return found.mode, np.asarray(found).tolist()


def palette() -> Image.Image:
    image = Image.fromarray(np.array([[0, 1, 2]], dtype=np.uint8), mode="P")
    image.putpalette([255, 0, 0, 0, 255, 0, 10, 20, 30])
    return image


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_exif_orientation_is_applied_once(orientation: int, format: str) -> None:
    stored = picture(1)[:5, :8]
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    assert decoded(Image.fromarray(stored), format, exif=exif) == ("RGB", UPRIGHT[orientation](stored).tolist())


def test_damaged_exif_counts_as_none() -> None:
    stored = Image.new("RGB", (8, 4), "red")
    mode, pixels = decoded(stored, "JPEG", exif=b"Exif\0\0no TIFF header")
    assert mode == "RGB" and np.shape(pixels) == (4, 8, 3)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_and_not_clipped(format: str) -> None:
    values = np.array([[0, 128, 129, 257, 32767, 32768, 65535]], dtype=np.uint16)
    assert decoded(Image.fromarray(values), format) == ("L", [[0, 0, 1, 1, 127, 128, 255]])
    assert np.rint(values / 257).astype(int).tolist() == [[0, 0, 1, 1, 127, 128, 255]], "the documented formula"


def test_integers_of_32_bits_count_as_16_bits_and_must_fit() -> None:
    assert decoded(Image.fromarray(np.array([[0, 257, 65535]], dtype=np.int32)), "TIFF") == ("L", [[0, 1, 255]])
    for values in ([[0, 65536]], [[-1, 0]]):
        with pytest.raises(UnreadableImageError, match=r"it: cannot decode it \(gray values .* do not fit 16 bits"):
            decoded(Image.fromarray(np.array(values, dtype=np.int32)), "TIFF")


def test_floats_are_refused() -> None:
    with pytest.raises(UnreadableImageError, match=r"it: cannot decode it \(floating-point pixels do not say which"):
        decoded(Image.fromarray(np.array([[0.5]], dtype=np.float32)), "TIFF")


@pytest.mark.parametrize(
    ("image", "options", "expected"),
    [
        (palette(), {}, ("RGB", [[[255, 0, 0], [0, 255, 0], [10, 20, 30]]])),
        (palette(), {"transparency": 2}, ("RGB", [[[255, 0, 0], [0, 255, 0], [255, 255, 255]]])),
        (palette(), {"transparency": bytes([0, 255, 255])}, ("RGB", [[[255, 255, 255], [0, 255, 0], [10, 20, 30]]])),
        (Image.new("RGBA", (1, 1), (9, 9, 9, 0)), {}, ("RGB", [[[255, 255, 255]]])),
        (Image.new("RGBA", (1, 1), (255, 0, 0, 128)), {}, ("RGB", [[[255, 127, 127]]])),
        (Image.new("RGBA", (1, 1), (7, 8, 9, 255)), {}, ("RGB", [[[7, 8, 9]]])),
        (Image.new("RGB", (1, 1), (7, 8, 9)), {"transparency": (7, 8, 9)}, ("RGB", [[[255, 255, 255]]])),
        (Image.new("LA", (1, 1), (100, 255)), {}, ("L", [[100]])),
        (Image.new("LA", (1, 1), (100, 0)), {}, ("L", [[255]])),
        (Image.new("L", (1, 1), 100), {"transparency": 100}, ("L", [[255]])),
        (Image.new("1", (1, 1), 1), {}, ("L", [[255]])),
    ],
    ids=["palette", "palette-color", "palette-alpha", "RGBA-0", "RGBA-128", "RGBA-255", "RGB-color", "LA-255", "LA-0",
         "L-color", "1"],
)  # fmt: skip
def test_mode_becomes_gray_or_color_on_white(
    image: Image.Image, options: dict[str, Any], expected: tuple[str, Pixels]
) -> None:
    assert decoded(image, "PNG", **options) == expected


def png(depth: int, color: int, width: int, rows: bytes, transparent: tuple[int, ...]) -> io.BytesIO:
    """A PNG of one row (RFC 2083), whose tRNS is of 16 bits for each channel whatever ``depth`` is."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checked = kind + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    head = struct.pack(">IIBBBBB", width, 1, depth, color, 0, 0, 0)
    parts = {b"IHDR": head, b"tRNS": struct.pack(f">{len(transparent)}H", *transparent)}
    parts |= {b"IDAT": zlib.compress(b"\0" + rows), b"IEND": b""}
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts.items()))


@pytest.mark.parametrize(
    ("depth", "color", "rows", "transparent", "expected"),
    [
        (1, 0, b"\x40", (0,), [255, 255, 255]),
        (2, 0, b"\x18", (1,), [0, 255, 170]),  # 0, 1, 2 of 3
        (4, 0, b"\x05\xa0", (5,), [0, 255, 170]),  # 0, 5, 10 of 15
        (8, 0, bytes([0, 1, 2]), (1,), [0, 255, 2]),
        (16, 0, struct.pack(">3H", 0, 257, 258), (257,), [0, 255, 1]),
        (16, 0, struct.pack(">3H", 0, 257, 65535), (0,), [255, 1, 255]),
        (16, 2, struct.pack(">9H", 65535, 32768, 257, 0, 0, 0, 0, 300, 0), (65535, 32768, 257),
         [[255, 255, 255], [0, 0, 0], [0, 1, 0]]),
        (16, 2, struct.pack(">9H", 100, 100, 100, 512, 0, 0, 0, 0, 65535), (100, 100, 100),
         [[255, 255, 255], [2, 0, 0], [0, 0, 255]]),
    ],
)  # fmt: skip
def test_transparent_color_of_a_png_of_any_depth_is_white(
    depth: int, color: int, rows: bytes, transparent: tuple[int, ...], expected: list[Any]
) -> None:
    file = png(depth, color, 3, rows, transparent)
    assert np.asarray(read_image(file, "it")).tolist() == [expected]
    with Image.open(file) as image:
        assert [np.asarray(to_8_bits(image)).tolist() for _ in range(2)] == [[expected]] * 2


def test_cmyk_becomes_color() -> None:
    for ink, color in (((0, 0, 0, 0), [255, 255, 255]), ((0, 0, 0, 255), [0, 0, 0]), ((255, 0, 0, 0), [0, 255, 255])):
        assert decoded(Image.new("CMYK", (1, 1), ink), "TIFF") == ("RGB", [[color]])


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_plain_images_stay_what_they_are(mode: str) -> None:
    image = Image.fromarray(picture(3)).convert(mode)
    assert to_8_bits(image) is image


def test_first_frame_counts() -> None:
    frames = [Image.new("RGB", (2, 2), color) for color in ("red", "blue")]
    assert decoded(frames[0], "TIFF", save_all=True, append_images=frames[1:])[1][0][0] == [255, 0, 0]


@pytest.mark.parametrize("content", [b"", b"not an image", "truncated"])
def test_damaged_file_is_one_line_that_names_it(content: bytes | str, tmp_path: Path) -> None:
    path = tmp_path / "bad.png"
    Image.fromarray(picture(0)).save(path)
    path.write_bytes(path.read_bytes()[:200] if isinstance(content, str) else content)
    with pytest.raises(UnreadableImageError, match=r"^bad\.png: cannot decode it \(.+\); repair or remove") as caught:
        read_image(str(path), "bad.png")
    assert "\n" not in str(caught.value) and caught.value.errno is None


def test_absent_file_keeps_the_systems_code_across_processes(tmp_path: Path) -> None:
    with pytest.raises(UnreadableImageError) as caught:
        read_image(str(tmp_path / "nowhere.png"), "nowhere.png")
    again = pickle.loads(pickle.dumps(caught.value))
    assert again.errno == errno.ENOENT and str(again) == str(caught.value)
