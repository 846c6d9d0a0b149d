"""What an image file becomes: 8-bit gray or color, upright, on white.

Files come in many modes, and PIL's own conversions lose more than they must: they clip 16 bits to 8, show what lies
under transparent pixels, and leave a photograph on its side. All data sets decode here, so each mode means one thing.
"""

from collections.abc import Callable
from typing import IO

import numpy as np
from PIL import Image, UnidentifiedImageError

from qtrain.data.image_set import REPAIR, UnreadableImageError

ORIENTATION = 0x0112
"""The EXIF tag that says how a camera was held."""

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Value of the tag -> what makes the image upright. The others (1, and none) are upright."""

BITS_OF_FILE: dict[str, Callable[[int], int]] = {
    "L;2": lambda value: 85 * value,
    "L;4": lambda value: 17 * value,
    "RGB;16B": lambda value: value >> 8,
}
"""How PIL names pixels of other bits in a file -> what it makes of their values."""

GRAY = ("1", "L", "LA", "La")
WITH_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")


def read_image(file: str | IO[bytes], where: str, *, remedy: str = REPAIR) -> Image.Image:
    """Decode ``file``, a path or an open file, as :func:`to_8_bits` gives it.

    Raises :class:`UnreadableImageError` where the file is absent, truncated, damaged, or no image. The error names the
    image by ``where``, and ends with ``remedy``.
    """
    try:
        with Image.open(file) as image:
            return to_8_bits(image)
    except UnidentifiedImageError as error:
        raise UnreadableImageError(where, "no known image format", remedy) from error
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, struct.error and others
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UnreadableImageError(where, reason, remedy, getattr(error, "errno", None)) from error


def to_8_bits(image: Image.Image) -> Image.Image:
    """An image as gray (mode ``L``) or color (``RGB``), 8 bits for each channel.

    - EXIF orientation is applied. An orientation that cannot be read counts as none.
    - Gray of 16 bits is scaled, ``round(v / 257)``; gray of 32-bit integers is taken for 16 bits. (PIL itself reads the
      upper 8 bits of color with 16.) Other 32-bit integers and floats are refused, since nothing says which is white.
    - A palette becomes color. CMYK and YCbCr are converted by PIL, without a color profile. Black and white becomes
      0 and 255.
    - Transparent pixels, by an alpha channel or by a transparent color, are blended with white. A color of 16 bits is
      transparent by its upper 8 bits, which are all that PIL reads.
    - Of several frames the first counts.

    An upright image of mode ``L`` or ``RGB`` without transparency is returned as it is. Raises ``ValueError`` for modes
    that PIL cannot convert.
    """
    _decode(image)
    image = _upright(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _scaled(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels do not say which value is white; store 8 or 16 bits")
    mode = "L" if image.mode in GRAY else "RGB"
    if image.mode in WITH_ALPHA or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        return white.convert(mode)
    return image if image.mode == mode else image.convert(mode)


def _decode(image: Image.Image) -> None:
    """Load ``image``, with its transparent color in the bits of its pixels: PIL leaves it in those of the file."""
    stored = [tile[3] for tile in getattr(image, "tile", [])]  # empty once it is loaded
    image.load()
    transparent = image.info.get("transparency")
    colors = transparent if isinstance(transparent, tuple) else (transparent,)
    for form, to_pixels in BITS_OF_FILE.items():
        if form in stored and all(isinstance(color, int) for color in colors):
            found = tuple(map(to_pixels, colors))
            image.info["transparency"] = found if isinstance(transparent, tuple) else found[0]


def _upright(image: Image.Image) -> Image.Image:
    try:
        turn = TURNS.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged EXIF beside a whole image; its parser raises as many kinds of errors as decoders do
        return image
    return image if turn is None else image.transpose(turn)


def _scaled(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"gray values {values.min()}..{values.max()} do not fit 16 bits; store 8 or 16 bits")
    if (transparent := image.info.get("transparency")) is not None:
        values[values == transparent] = 65535
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))
