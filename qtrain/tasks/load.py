"""Floor 6: the data of a run, real or imagined."""

from __future__ import annotations

from omegaconf import DictConfig

from qtrain.data.base import VisionData
from qtrain.tasks.imagine import imagine, is_imagined
from qtrain.tasks.instantiate import instantiate
from qtrain.tasks.targets import ConfigError


def load_data(cfg: DictConfig, *, test_only: bool = False) -> VisionData:
    """The config's data module, read and split, with the run's seed; with ``test_only`` no training image is opened.

    Imagined images that it does not name are made first, by the config's own model, and kept.
    """
    missing = is_imagined(cfg.data) and cfg.data.folder is None and not test_only
    folder = {"folder": str(imagine(cfg).folder)} if missing else {}
    data: VisionData = instantiate(cfg.data, seed=cfg.seed, **folder)
    if test_only:
        data.test_only()
    try:
        data.setup()
    except (ValueError, OSError) as error:
        raise ConfigError(f"data: {error}") from error
    return data
