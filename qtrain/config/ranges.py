"""Rules for single values, held before anything heavy is loaded: what a number may be, and where results go."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from qtrain.settings.run_settings import RunSettings
from qtrain.utils.checks import broken_rule
from qtrain.utils.errors import ConfigError

RANGES = {
    "[0, inf)": (
        "fit.epochs", "full_precision.epochs", "fit.scale_lr", "fit.reestimate_bn", "fit.health_every_steps",
        "teacher.lr", "distill.hard", "distill.soft", "distill.hint", "optimizer.lr", "optimizer.momentum",
        "optimizer.weight_decay", "full_precision.optimizer.lr", "full_precision.optimizer.momentum",
        "full_precision.optimizer.weight_decay",
    ),
    "[1, inf)": (
        "fit.log_every_steps", "fit.checkpoint_every_steps", "quantize.calibration_batches", "synthesize.images",
        "synthesize.world_size", "allocate.batches", "trainer.accumulate_grad_batches",
        "trainer.check_val_every_n_epoch",
    ),
    "(0, inf)": ("fit.clip_norm", "distill.temperature"),
    "(0, 1]": ("fit.share", "allocate.weight_error"),
    "[0, 1)": ("fit.weight_average",),
    "[0, 4294967296)": ("seed",),
}  # fmt: skip
"""Interval -> keys whose numbers must lie in it; seeds are those that all libraries take."""

MOST_BITS, FULL_PRECISION = 16, 32
"""As in :mod:`qtrain.spec`, which loads torch."""

BITS = "quantize.bits"
"""Where the numbers ``weight`` and ``input`` are bits, also of the parts ``first`` and ``last``."""


def check_values(plain: Mapping[str, Any]) -> None:
    """Raise ``ConfigError`` for the first number of the resolved config ``plain`` that breaks a rule."""
    for interval, keys in RANGES.items():
        for key in keys:
            value = _at(plain, key)
            if _is_number(value) and (rule := broken_rule(interval, value)):
                raise ConfigError(f"{key}: must be {rule}, got {value}")
    for key, bits in _bits(_at(plain, BITS), BITS):
        if not 1 <= bits <= MOST_BITS and bits != FULL_PRECISION:
            raise ConfigError(f"{key}: must be 1..{MOST_BITS} bits, or {FULL_PRECISION} for full precision, got {bits}")
    for key in ("allocate.weight", "allocate.input"):
        for bits in _at(plain, key) or ():
            if not 1 <= bits <= MOST_BITS and bits != FULL_PRECISION:
                raise ConfigError(f"{key}: widths must be 1..{MOST_BITS} bits, or {FULL_PRECISION}, got {bits}")
        if not _at(plain, key):
            raise ConfigError(f"{key}: needs a width at least, for example [2, 4, 8]")
    for key in ("fit.compile", "teacher.compile"):
        if not isinstance(value := _at(plain, key), bool) and value != "auto":
            raise ConfigError(f"{key}: must be true, false or auto, got {value!r}")
    if plain["select"] is not None and not plain["variants"]:
        raise ConfigError("select: there are no variants; choose an experiment that has some, or leave it out")
    if (name := plain["name"]) and ".." in Path(name).parts:
        raise ConfigError(f"name: {name!r} leaves the folder of the experiment; give a name without '..'")


def check_deletions(overrides: Sequence[str]) -> None:
    """Raise ``ConfigError`` where one of ``overrides`` takes away what every run needs, and none puts it back."""
    added = {re.split(r"[=.@]", text[1:])[0] for text in overrides if text.startswith("+")}
    placed = {text[1:].partition("=")[0].partition("@")[2] for text in overrides if text.startswith("+")}
    for text in overrides:
        key = text[1:].partition("=")[0]
        if text.startswith("~") and key in REQUIRED and key not in added | placed:
            instead = {"quantize": "quantize.enabled=false trains in full precision", "teacher": "teacher=none"}
            raise ConfigError(f"{text}: every run needs {key!r}; {instead.get(key, f'give {key}=... another value')}")


REQUIRED = tuple(key.name for key in fields(RunSettings) if key.default is MISSING and key.default_factory is MISSING)
"""Keys and sections that no run can do without."""


def _bits(node: Any, where: str) -> Iterator[tuple[str, int]]:
    if isinstance(node, Mapping):
        for name in ("weight", "input"):
            if _is_number(node.get(name)):
                yield f"{where}.{name}", node[name]
        for part in ("first", "last"):
            yield from _bits(node.get(part), f"{where}.{part}")


def _at(plain: Mapping[str, Any], key: str) -> Any:
    node: Any = plain
    for part in key.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
