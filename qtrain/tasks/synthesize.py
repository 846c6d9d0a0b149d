"""Floor 6: the task that makes images from a model, for data=synthetic to train on and calibrate with."""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from PIL import Image

from qtrain.data.imagined import read_images
from qtrain.files import whole_file
from qtrain.tasks import record
from qtrain.tasks.imagine import Imagined, imagine, is_imagined
from qtrain.tasks.targets import ConfigError

log = logging.getLogger(__name__)

PICTURE = "images.png"
SHOWN = 100


def run(cfg: DictConfig) -> dict[str, Any]:
    """Make the images of ``cfg.synthesis``, or find them; returns their folder and the figures of the manifest."""
    start = time.perf_counter()
    if not is_imagined(cfg.data):
        raise ConfigError("data: task=synthesize makes images for data=synthetic, which says their shape and classes")
    imagined = imagine(cfg)
    folder = Path(cfg.run_dir)
    picture = draw(imagined, folder / PICTURE)
    figures: dict[str, Any] = dict(imagined.manifest.figures)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    row = {
        "experiment": cfg.experiment,
        "dataset": cfg.data.name,
        "model": cfg.model.name,
        "seed": cfg.seed,
        "wall_s": time.perf_counter() - start,
        **figures,
    }
    if imagined.made:
        row["s_per_1000_images"] = 1e3 * imagined.seconds / imagined.made
    method = str(cfg.synthesis["_target_"]).rpartition(".")[2]
    record.append_results(cfg, folder, row, device=device, notes=f"{method}, {imagined.made} images made")
    told = ", ".join(f"{name} {value:.4g}" for name, value in figures.items() if name != "images")
    print(f"{figures['images']:.0f} images by {method} of {cfg.model.name}: {told}")
    print(f"to use them: data=synthetic data.folder={imagined.folder}\npicture: {picture}")
    return {"folder": str(imagined.folder), **figures}


def draw(imagined: Imagined, path: Path, *, scale: int = 2) -> Path:
    """A grid of the first images of ``imagined``, each ``scale`` times as large, as a PNG at ``path``."""
    first = imagined.manifest.checked_files()[0]
    images = read_images(first, SHOWN)
    count, height, width, channels = images.shape
    columns = math.ceil(math.sqrt(count))
    grid = Image.new("RGB", (columns * (width + 1) - 1, math.ceil(count / columns) * (height + 1) - 1), "white")
    for number, image in enumerate(images):
        tile = Image.fromarray(image[..., 0] if channels == 1 else image)
        grid.paste(tile, ((number % columns) * (width + 1), (number // columns) * (height + 1)))
    with whole_file(path) as temporary:
        grid.resize((grid.width * scale, grid.height * scale), Image.Resampling.NEAREST).save(temporary, format="PNG")
    return path
