"""The task that makes images from a model, for data=synthetic to train on and calibrate with."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from qtrain.config.instantiate import instantiate
from qtrain.data.image_grid import PICTURE, draw_images
from qtrain.data.synthetic import SyntheticImages
from qtrain.pipeline import run_folder
from qtrain.pipeline.synthetic_images import synthesize_images
from qtrain.utils.errors import ConfigError

log = logging.getLogger(__name__)


def run(cfg: DictConfig) -> dict[str, Any]:
    """Make the images of ``cfg.synthesis``, or find them; returns their folder and the metrics of the manifest."""
    start = time.perf_counter()
    if not isinstance(instantiate(cfg.data), SyntheticImages):
        raise ConfigError("data: task=synthesize makes images for data=synthetic, which says their shape and classes")
    synthetic = synthesize_images(cfg)
    folder = Path(cfg.run_dir)
    draw_images(synthetic.folder, folder / PICTURE)
    metrics: dict[str, Any] = dict(synthetic.manifest.metrics)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    row = {
        "experiment": cfg.experiment,
        "dataset": cfg.data.name,
        "model": cfg.model.name,
        "seed": cfg.seed,
        "wall_s": time.perf_counter() - start,
        **metrics,
    }
    if synthetic.made:
        row["s_per_1000_images"] = 1e3 * synthetic.seconds / synthetic.made
    method = str(cfg.synthesis["_target_"]).rpartition(".")[2]
    run_folder.append_results(cfg, folder, row, device=device, notes=f"{method}, {synthetic.made} images made")
    told = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if name != "images")
    print(f"{metrics['images']:.0f} images by {method} of {cfg.model.name}: {told}")
    print(f"to use them: data=synthetic data.folder={synthetic.folder}\npicture: {folder / PICTURE}")
    return {"folder": str(synthetic.folder), **metrics}
