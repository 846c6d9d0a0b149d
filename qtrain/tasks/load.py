"""Floor 6: the data of a run, real or imagined."""

from __future__ import annotations

from omegaconf import DictConfig

from qtrain.data.base import VisionData
from qtrain.data.synthetic import SyntheticImages
from qtrain.tasks.imagine import imagine
from qtrain.tasks.instantiate import instantiate
from qtrain.tasks.targets import ConfigError


def load_data(cfg: DictConfig, *, test_only: bool = False, imagines: bool = True) -> VisionData:
    """The config's data module, read and split, with the run's seed; with ``test_only`` no training image is opened.

    Imagined images that it does not name are made first, by the config's own model, and kept. Where they do not matter,
    without ``imagines``, they are neither made nor opened.
    """
    data: VisionData = instantiate(cfg.data, seed=cfg.seed)
    if test_only or (isinstance(data, SyntheticImages) and not imagines):
        data.test_only()
    elif isinstance(data, SyntheticImages) and data.folder is None:
        data.folder = str(imagine(cfg).folder)
    try:
        data.setup()
    except (ValueError, OSError) as error:
        raise ConfigError(f"data: {error}") from error
    return data
