"""The data of a run, real or synthetic."""

from __future__ import annotations

import copy
from typing import Any

from omegaconf import DictConfig, OmegaConf

from qtrain.config.instantiate import instantiate
from qtrain.data.base import VisionData
from qtrain.data.synthetic import SyntheticImages
from qtrain.pipeline.run_cache import cached
from qtrain.pipeline.synthetic_images import synthesize_images
from qtrain.utils.errors import ConfigError


def load_data(cfg: DictConfig, *, test_only: bool = False, synthesizes: bool = True) -> VisionData:
    """The config's data module, read and split, with the run's seed; with ``test_only`` no training image is opened.

    Synthetic images that it does not name are made first, by the config's own model, and kept. Where they do not
    matter, without ``synthesizes``, they are neither made nor opened.
    """
    how = {"test_only": test_only, "synthesizes": synthesizes}
    # A shallow copy has a trainer and a first epoch of its own, and the images of the one that is kept.
    return cached("data", {**depends_on(cfg), **how}, lambda: _load(cfg, **how), copy.copy)


def depends_on(cfg: DictConfig) -> dict[str, Any]:
    """All that the config's images are a function of, as plain data."""
    sections = {name: cfg.get(name) for name in ("data", "synthesis", "synthesize", "model", "full_precision")}
    return {
        "seed": cfg.seed,
        **{name: OmegaConf.to_container(node, resolve=True) for name, node in sections.items() if node},
    }


def _load(cfg: DictConfig, *, test_only: bool, synthesizes: bool) -> VisionData:
    data: VisionData = instantiate(cfg.data, seed=cfg.seed)
    if test_only or (isinstance(data, SyntheticImages) and not synthesizes):
        data.test_only()
    elif isinstance(data, SyntheticImages) and data.folder is None:
        data.folder = str(synthesize_images(cfg).folder)
    try:
        data.setup()
    except (ValueError, OSError) as error:
        raise ConfigError(f"data: {error}") from error
    return data
