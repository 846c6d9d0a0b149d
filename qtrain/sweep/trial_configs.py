"""The config of a trial: the sweep's own overrides, then what the knobs change, then what every trial has."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

from qtrain.settings.conf_dir import conf_dir
from qtrain.settings.run_settings import Compose, RunSettings
from qtrain.sweep.domains import KnobValues
from qtrain.sweep.wandb_sweep import sweep_group
from qtrain.utils.atomic_write import write_text

COMPOSED = "composed.json"
"""The whole config of a trial in its run's folder, for the worker, which so has nothing to compose."""

NOT_OF_A_TRIAL = ("task", "name", "run_dir", "output", "resume", "overwrite", "results", "report", "select")
"""Keys of the sweep's own overrides that say nothing of a trial's run."""


@final
class TrialConfigs:
    """Composes the trials of the sweep ``settings``, that ``overrides`` led to, and keeps their configs below
    ``folder``.
    """

    def __init__(self, settings: RunSettings, overrides: Sequence[str], *, folder: Path, compose: Compose) -> None:
        self.folder, self._compose = folder, compose
        self._own = [override for override in overrides if not _is_the_sweeps(override)]
        self._always = always(settings)
        self._group = sweep_group(settings.plain, folder.parent)
        self._keys: dict[tuple[str, ...], str] = {}

    def __call__(self, changes: Sequence[str]) -> tuple[str, list[str]]:
        """Identity and overrides of the trial in which the knobs make ``changes``. Raises ``ConfigError``."""
        overrides = self._overrides(changes)
        if (known := self._keys.get(tuple(overrides))) is not None:
            return known, overrides
        settings = self._compose(overrides)
        key = self._keys[tuple(overrides)] = settings.identity
        told = {"group": self._group, "job_type": "trial"}
        plain = {
            **settings.plain,
            "run_dir": str(self.folder / key),
            "results": None,
            "logger": _changed(settings.plain["logger"], told),
        }
        write_text(self.folder / key / COMPOSED, json.dumps(plain))
        return key, overrides

    def config(self, changes: Sequence[str]) -> RunSettings:
        """What that trial would be, and nothing kept."""
        return self._compose(self._overrides(changes))

    def _overrides(self, changes: Sequence[str]) -> list[str]:
        return joined([*self._own, *changes, *self._always])


def read_trial_config(folder: Path, *, name: str, knobs: KnobValues) -> dict[str, object]:
    """The config that :class:`TrialConfigs` has kept in ``folder``; W&B is told the trial's ``name`` and ``knobs``."""
    plain: dict[str, Any] = json.loads((folder / COMPOSED).read_text(encoding="utf-8"))
    return {**plain, "logger": _changed(plain["logger"], {"name": name, "knobs": dict(knobs)})}


def _changed(
    loggers: Mapping[str, Mapping[str, object]], options: Mapping[str, object]
) -> dict[str, Mapping[str, object]]:
    """``loggers`` of a config with these ``options``, where they have them."""
    return {name: {**node, **options} if options.keys() <= node.keys() else node for name, node in loggers.items()}


def always(settings: RunSettings) -> list[str]:
    """What every trial of a sweep has: images held out of the training images, test images left alone."""
    overrides = ["task=train", "fit.final_test=false"]
    if not settings.data.get("val_fraction"):
        overrides.append(f"data.val_fraction={settings.sweep.val_fraction:g}")
    if settings.variants:
        overrides.append("variants=null")
    if settings.sweep.workers > 1:
        overrides.append(f"trainer.devices={settings.sweep.workers}")
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
