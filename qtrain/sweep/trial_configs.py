"""The config of a trial: the sweep's own overrides, then what the knobs change, then what every trial has."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

from omegaconf import DictConfig, OmegaConf

from qtrain.config.compose import compose
from qtrain.pipeline import run_folder
from qtrain.settings.conf_dir import conf_dir
from qtrain.tracking.run_tracking import sweep_group
from qtrain.utils.atomic_write import write_text

COMPOSED = "composed.json"
"""The whole config of a trial in its run's folder, for the worker, which so has nothing to compose."""

NOT_OF_A_TRIAL = ("task", "name", "run_dir", "output", "resume", "overwrite", "results", "report", "select")
"""Keys of the sweep's own overrides that say nothing of a trial's run."""


@final
class Configs:
    """Composes the trials of the sweep ``cfg``, that ``overrides`` led to, and keeps their configs below ``folder``."""

    def __init__(self, cfg: DictConfig, overrides: Sequence[str], *, folder: Path) -> None:
        self.folder = folder
        self._own = [override for override in overrides if not _is_the_sweeps(override)]
        self._always = always(cfg)
        self._group = sweep_group(cfg, folder.parent)
        self._keys: dict[tuple[str, ...], str] = {}

    def __call__(self, changes: Sequence[str]) -> tuple[str, list[str]]:
        """Identity and overrides of the trial in which the knobs make ``changes``. Raises ``ConfigError``."""
        overrides = self._overrides(changes)
        if (known := self._keys.get(tuple(overrides))) is not None:
            return known, overrides
        cfg = compose(overrides)
        key = self._keys[tuple(overrides)] = run_folder.identity_of(cfg)
        cfg.run_dir, cfg.results = str(self.folder / key), None
        for logger in cfg.logger.values():
            if "group" in logger and "job_type" in logger:
                logger.group, logger.job_type = self._group, "trial"
        write_text(self.folder / key / COMPOSED, json.dumps(OmegaConf.to_container(cfg, resolve=True)))
        return key, overrides

    def config(self, changes: Sequence[str]) -> DictConfig:
        """What that trial would be, and nothing kept."""
        return compose(self._overrides(changes))

    def _overrides(self, changes: Sequence[str]) -> list[str]:
        return joined([*self._own, *changes, *self._always])


def read_config(folder: Path, *, name: str, knobs: Mapping[str, Any]) -> DictConfig:
    """The config that :class:`Configs` has kept in a trial's ``folder``; W&B is told the trial's ``name`` and knobs."""
    cfg = OmegaConf.create(json.loads((folder / COMPOSED).read_text(encoding="utf-8")))
    assert isinstance(cfg, DictConfig)
    for logger in cfg.logger.values():
        if "name" in logger and "knobs" in logger:
            logger.name, logger.knobs = name, dict(knobs)
    return cfg


def always(cfg: DictConfig) -> list[str]:
    """What every trial of the sweep ``cfg`` has: images held out of the training images, test images left alone."""
    overrides = ["task=train", "fit.final_test=false"]
    if not cfg.data.get("val_fraction"):
        overrides.append(f"data.val_fraction={cfg.sweep.val_fraction:g}")
    if cfg.variants:
        overrides.append("variants=null")
    if cfg.sweep.workers > 1:
        overrides.append(f"trainer.devices={cfg.sweep.workers}")
    return overrides


def joined(overrides: Sequence[str]) -> list[str]:
    """``overrides`` with the last choice of each group alone: Hydra takes a group only once."""
    last = {_key(override): number for number, override in enumerate(overrides)}
    return [o for n, o in enumerate(overrides) if last[_key(o)] == n or not _is_group(_key(o))]


def _key(override: str) -> str:
    return override.lstrip("+~").partition("=")[0]


def _is_group(key: str) -> bool:
    return (conf_dir() / key.partition("@")[0].lstrip("/")).is_dir()


def _is_the_sweeps(override: str) -> bool:
    key = _key(override)
    place = key.rpartition("@")[2]
    return key in NOT_OF_A_TRIAL or place == "sweep" or place.startswith("sweep.")
