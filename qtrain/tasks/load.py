"""Floor 6: the data of a run, real or imagined."""

from __future__ import annotations

from omegaconf import DictConfig

from qtrain.data.base import VisionData
from qtrain.tasks.imagine import imagine, is_imagined
from qtrain.tasks.instantiate import instantiate
from qtrain.tasks.targets import ConfigError


def load_data(cfg: DictConfig) -> VisionData:
    """The config's data module, read and split, with the run's seed.

    Imagined images that it does not name are made first, by the config's own model, and kept.
    """
    folder = {"folder": str(imagine(cfg).folder)} if is_imagined(cfg.data) and cfg.data.folder is None else {}
    data: VisionData = instantiate(cfg.data, seed=cfg.seed, **folder)
    try:
        data.setup()
    except (ValueError, OSError) as error:
        raise ConfigError(f"data: {error}") from error
    return data
