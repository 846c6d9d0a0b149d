"""Floor 6: the task that makes images from a model, for data=synthetic to train on and calibrate with."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from qtrain.data.synthetic import SyntheticImages
from qtrain.tasks import record
from qtrain.tasks.imagine import imagine
from qtrain.tasks.instantiate import instantiate
from qtrain.tasks.picture import PICTURE, draw
from qtrain.tasks.targets import ConfigError

log = logging.getLogger(__name__)


def run(cfg: DictConfig) -> dict[str, Any]:
    """Make the images of ``cfg.synthesis``, or find them; returns their folder and the figures of the manifest."""
    start = time.perf_counter()
    if not isinstance(instantiate(cfg.data), SyntheticImages):
        raise ConfigError("data: task=synthesize makes images for data=synthetic, which says their shape and classes")
    imagined = imagine(cfg)
    folder = Path(cfg.run_dir)
    draw(imagined.folder, folder / PICTURE)
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
    print(f"to use them: data=synthetic data.folder={imagined.folder}\npicture: {folder / PICTURE}")
    return {"folder": str(imagined.folder), **figures}
