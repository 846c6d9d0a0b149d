"""The task that makes images from a model, for data=synthetic to train on and calibrate with."""

import logging
import time
from pathlib import Path
from typing import Any

import torch

from qtrain.data.image_grid import PICTURE, draw_images
from qtrain.data.synthetic import SyntheticImages
from qtrain.pipeline import run_folder
from qtrain.pipeline.results import check_results
from qtrain.pipeline.synthetic_images import synthesize_images
from qtrain.settings.run_settings import RunSettings
from qtrain.utils.errors import ConfigError

log = logging.getLogger(__name__)


def run(settings: RunSettings) -> dict[str, Any]:
    """Make the images of ``settings.synthesis``, or find them; returns their folder and the metrics of the manifest."""
    start = time.perf_counter()
    if not isinstance(settings.data.build(), SyntheticImages):
        raise ConfigError("data: task=synthesize makes images for data=synthetic, which says their shape and classes")
    if settings.results:
        check_results(settings.results)
    synthetic = synthesize_images(settings)
    folder = Path(settings.run_dir)
    draw_images(synthetic.folder, folder / PICTURE)
    metrics: dict[str, Any] = dict(synthetic.manifest.metrics)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    row = {
        "experiment": settings.experiment,
        "dataset": settings.data.name,
        "model": settings.model.name,
        "seed": settings.seed,
        "wall_s": time.perf_counter() - start,
        **metrics,
    }
    if synthetic.made:
        row["s_per_1000_images"] = 1e3 * synthetic.seconds / synthetic.made
    method = "" if settings.synthesis is None else settings.synthesis.kind
    run_folder.append_results(settings, folder, row, device=device, notes=f"{method}, {synthetic.made} images made")
    told = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if name != "images")
    print(f"{metrics['images']:.0f} images by {method} of {settings.model.name}: {told}")
    print(f"to use them: data=synthetic data.folder={synthetic.folder}\npicture: {folder / PICTURE}")
    return {"folder": str(synthetic.folder), **metrics}
