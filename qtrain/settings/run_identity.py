"""A config as plain values, and what a stage's config lays over the run's.

Loads neither torch nor Lightning, since every mistyped command comes through here.
"""

from __future__ import annotations

import copy
from typing import Any

from omegaconf import DictConfig, OmegaConf

from qtrain.utils.errors import ConfigError

MAY_CHANGE = (
    "callbacks", "data", "distill", "fit", "lr_schedule", "objective", "optimizer", "quantize", "teacher", "trainer",
)  # fmt: skip
"""Sections of the config that a stage may have of its own."""


def plain_config(cfg: DictConfig) -> dict[str, Any]:
    """``cfg`` resolved, as dicts, lists and values; what identifies and describes the run, not where it is kept."""
    plain = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(plain, dict)
    plain.pop("run_dir", None)
    # Only a source of values: those that the run uses stand resolved where it uses them.
    plain.pop("budgets", None)
    # What a run is a trial of, and where it is looked at: the same run, alone or in a sweep.
    for section in ("sweep", "review"):
        plain.pop(section, None)
    # Where synthetic images are kept, and who makes them.
    for key in ("folder", "workers", "rank", "world_size"):
        plain.get("synthesize", {}).pop(key, None)
    stages = (plain.get("stages") or {}).values()
    for config in (plain, *(stage for stage in stages if isinstance(stage, dict))):
        config.get("full_precision", {}).pop("folder", None)
        config.get("teacher", {}).get("cache", {}).pop("folder", None)
    return {str(key): value for key, value in plain.items()}


def identifying(plain: dict[str, Any]) -> dict[str, Any]:
    """A :func:`plain_config` without the processes, how many and who holds what: with others it is the same run."""
    own = copy.deepcopy(plain)
    stages = (own.get("stages") or {}).values()
    for config in (own, *(stage for stage in stages if isinstance(stage, dict))):
        for key in ("devices", "num_nodes", "strategy"):
            config.get("trainer", {}).pop(key, None)
        for section in ("fit", "teacher"):
            config.get(section, {}).pop("shard", None)
    return own


def changes(base: DictConfig, stage: DictConfig, name: str) -> dict[str, Any]:
    """The sections in which a stage's config differs from the run's, resolved.

    Raises :class:`ConfigError` where it differs in what all stages of a run have in common.
    """
    before, after = plain_config(base), plain_config(stage)
    differing = [key for key, value in after.items() if key != "stages" and before.get(key) != value]
    for key in differing:
        if key not in MAY_CHANGE:
            raise ConfigError(
                f"stages.{name}: changes {key}, which all stages of a run share; a stage may change "
                f"{', '.join(MAY_CHANGE)}"
            )
    whole = OmegaConf.to_container(stage, resolve=True)
    assert isinstance(whole, dict)
    return {key: whole[key] for key in differing}
