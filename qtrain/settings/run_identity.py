"""What identifies a run: its config as plain values, without what its result does not depend on.

Loads neither torch nor Lightning, since every mistyped command comes through here.
"""

import copy
import hashlib
import json
from collections.abc import Collection, Mapping
from typing import Any

from qtrain.utils.errors import ConfigError

MAY_CHANGE = (
    "callbacks", "data", "distill", "fit", "lr_schedule", "objective", "optimizer", "quantize", "teacher", "trainer",
)  # fmt: skip
"""Sections of the config that a stage may have of its own."""

NOT_HASHED = (
    "output", "name", "run_dir", "resume", "overwrite", "results", "report", "logger", "allow_targets", "select",
)  # fmt: skip
"""Top-level keys that do not change a run's result: where it goes, and how it is shown."""


NO_PART_OF_A_RUN = (
    "run_dir",
    "budgets",
    "sweep",
    "predict",
    "export",
    "benchmark",
    "profile",
    "images",
    "bits",
    "review",
)
"""Top-level keys that a run's ``config.yaml`` does not hold. ``budgets`` is only a source of values: those that the run
uses stand resolved where it uses them. A run is the same alone and in a sweep, and wherever it is looked at."""

LATER = (("data", "labeled", None), ("data", "test_images", 360), ("full_precision", "all_labels", False))
"""Keys that came later, with the value that earlier runs had without them: it is no difference."""

WITHOUT_EFFECT = {"workers": 4, "check": False, "cache_dir": None}
"""Keys of ``data`` on which no result depends, and what counts in their place, that of most data sets."""

OF_LINT_ALONE = ("layers_in_float", "between_codes")
"""Keys of a target from which ``task=lint`` tells what stays in floating point; a student is the same with others."""


def recorded(plain: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a resolved config that a run's ``config.yaml`` holds: what describes the run, not its place."""
    kept: dict[str, Any] = copy.deepcopy(dict(plain))
    for section in NO_PART_OF_A_RUN:
        kept.pop(section, None)
    # Where synthetic images are kept, and who makes them.
    for key in ("folder", "workers", "rank", "world_size"):
        kept.get("synthesize", {}).pop(key, None)
    for config in _with_stages(kept):
        config.get("full_precision", {}).pop("folder", None)
        config.get("teacher", {}).get("cache", {}).pop("folder", None)
    return kept


def restored(config: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """A whole config again from one that :func:`recorded` has made: what was left out is as in ``like``."""
    whole: dict[str, Any] = copy.deepcopy(dict(config))
    for section in (*NO_PART_OF_A_RUN, "allocate"):  # runs of earlier versions have no search over bits
        whole.setdefault(section, copy.deepcopy(like[section]))
    for key in ("folder", "workers", "rank", "world_size"):
        whole["synthesize"].setdefault(key, like["synthesize"][key])
    for own in _with_stages(whole):
        if "full_precision" in own:
            own["full_precision"].setdefault("folder", like["full_precision"]["folder"])
        if "teacher" in own:
            own["teacher"]["cache"].setdefault("folder", like["teacher"]["cache"]["folder"])
    return whole


def comparable(plain: Mapping[str, Any]) -> dict[str, Any]:
    """A :func:`recorded` config with neither the processes that share the work, nor :data:`OF_LINT_ALONE`, nor those of
    :data:`LATER` that change nothing, nor values of :data:`WITHOUT_EFFECT`: with others it is the same run.
    """
    own: dict[str, Any] = copy.deepcopy(dict(plain))
    for key in OF_LINT_ALONE:
        (own.get("target") or {}).pop(key, None)
    for config in _with_stages(own):
        for key in ("devices", "num_nodes", "strategy"):
            config.get("trainer", {}).pop(key, None)
        for section in ("fit", "teacher"):
            config.get(section, {}).pop("shard", None)
        config.get("allocate", {}).pop("folder", None)  # where scores and bits are kept
        data = config.get("data", {})
        data.update({key: value for key, value in WITHOUT_EFFECT.items() if key in data})
        for section, key, value in LATER:
            if config.get(section, {}).get(key, value) == value:
                config.get(section, {}).pop(key, None)
    return own


def without_seeds(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` without each key ``seed`` in it and in the mappings that it holds."""
    return {
        key: without_seeds(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key != "seed"
    }


def hash_of(config: Mapping[str, Any], *, ignore: Collection[str] = NOT_HASHED) -> str:
    """Twelve hex digits that two runs share if and only if their configurations agree.

    ``config`` is the plain, resolved configuration; its top-level keys in ``ignore`` do not count, nor does the order
    of keys. Values that JSON lacks raise ``TypeError``.
    """
    kept = {key: value for key, value in config.items() if key not in ignore}
    canonical = json.dumps(kept, sort_keys=True, separators=(",", ":"), allow_nan=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def stage_changes(base: Mapping[str, Any], stage: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The sections in which the resolved config of stage ``name`` differs from that of the run.

    Raises :class:`ConfigError` where it differs in what all stages of a run have in common.
    """
    before, after = recorded(base), recorded(stage)
    differing = [key for key, value in after.items() if key != "stages" and before.get(key) != value]
    for key in differing:
        if key not in MAY_CHANGE:
            raise ConfigError(
                f"stages.{name}: changes {key}, which all stages of a run share; a stage may change "
                f"{', '.join(MAY_CHANGE)}"
            )
    return {key: stage[key] for key in differing}


def _with_stages(config: dict[str, Any]) -> list[dict[str, Any]]:
    """``config`` and the sections that its stages have of their own."""
    stages = (config.get("stages") or {}).values()
    return [config, *(stage for stage in stages if isinstance(stage, dict))]
