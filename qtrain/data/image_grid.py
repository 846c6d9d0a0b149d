"""A picture of synthetic images: the first of them in a grid."""

import math
from pathlib import Path

from PIL import Image

from qtrain.data.base import VisionData
from qtrain.data.synthetic import SyntheticImages
from qtrain.data.synthetic_store import read_images, read_manifest
from qtrain.utils.atomic_write import atomic_write

PICTURE = "images.png"
IMAGES_SHOWN = 100
SCALE = 2
"""Width and height of a pixel in the picture."""


def keep_picture(data: VisionData, folder: Path) -> None:
    """Write a picture to a run's ``folder`` if its images are synthetic."""
    if isinstance(data, SyntheticImages) and data.folder is not None:
        draw_images(Path(data.folder), folder / PICTURE)


def draw_images(images: Path, path: Path) -> None:
    """A grid of the first images of the folder ``images`` as a PNG at ``path``."""
    tiles = read_images(read_manifest(images).checked_files()[0], IMAGES_SHOWN)
    count, height, width, channels = tiles.shape
    columns = math.ceil(math.sqrt(count))
    size = (columns * (width + 1) - 1, math.ceil(count / columns) * (height + 1) - 1)
    grid = Image.new("RGB", size, "white")
    for number, tile in enumerate(tiles):
        place = ((number % columns) * (width + 1), (number // columns) * (height + 1))
        grid.paste(Image.fromarray(tile[..., 0] if channels == 1 else tile), place)
    with atomic_write(path) as temporary:
        grid.resize((SCALE * grid.width, SCALE * grid.height), Image.Resampling.NEAREST).save(temporary, format="PNG")
