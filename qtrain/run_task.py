"""One run of a task, or one for each variant that the experiment names, side by side."""

import fnmatch
import importlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qtrain.config.compose import compose
from qtrain.config.multirun import variant_name
from qtrain.config.run_logging import logged_in
from qtrain.settings.run_settings import RunSettings
from qtrain.utils.errors import ConfigError

log = logging.getLogger(__name__)

WITH_VARIANTS = ("train", "calibrate")
"""Tasks that leave a student."""

COMPOSES = ("sweep",)
"""Tasks that compose further configs from the overrides that led to their own."""

EXTRAS = {
    "sweep": "sweep",
    "review": "wandb",
    "export": "export",
    "verify": "export",
    "benchmark": "export",
    "profile": "export",
}
"""Tasks that need more than a plain installation, and the extra that brings it."""


def run_task(settings: RunSettings, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Run ``settings.task``; ``overrides`` are those that led to ``settings``.

    Where a training or a calibration names ``variants``, each that ``select`` does not leave out is a run of its own:
    the same overrides, then the variant's, which may name another task, with the variant's name, and a ``name`` of the
    settings behind it. Finished ones are not repeated, so the same command picks up where it was stopped. At the end
    all of the experiment's runs go into one report. Figures of variants come back as ``<variant>/<metric>``.
    """
    if settings.task not in WITH_VARIANTS or not settings.variants:
        return _run(settings, overrides)
    assert overrides, "each variant is composed of them anew"
    together: dict[str, Any] = {}
    chosen = selected(settings)
    for number, name in enumerate(chosen, start=1):
        log.info("variant %d of %d: %s", number, len(chosen), name)
        named = f"name={variant_name(name, settings.name)}"
        changes = [*settings.variants[name], named, "variants=null", "select=null"]
        try:
            variant = compose([*overrides, *changes], typed=overrides)
        except ConfigError as error:
            raise ConfigError(f"variants.{name}: {error}; variants=null is a single run without them") from error
        together |= {f"{name}/{key}": value for key, value in _run(variant).items()}
    folder = Path(settings.run_dir).parent
    report = compose([*overrides, "task=report", "variants=null", "select=null", f"report.folder={folder}"])
    _run(report)
    return together


def _run(settings: RunSettings, overrides: Sequence[str] = ()) -> dict[str, Any]:
    try:
        run = importlib.import_module(f"qtrain.tasks.{settings.task}").run
    except ModuleNotFoundError as error:
        extra = EXTRAS.get(settings.task)
        if extra is None or (error.name or "").startswith("qtrain"):
            raise
        raise ConfigError(
            f"task={settings.task}: {error.name} is not installed; pip install 'qtrain[{extra}]'"
        ) from error
    with logged_in(Path(settings.run_dir)):
        metrics: dict[str, Any] = run(settings, overrides) if settings.task in COMPOSES else run(settings)
    return metrics


def selected(settings: RunSettings) -> list[str]:
    """Names of the variants to run, in order. Raises ``ConfigError`` for a pattern that fits none of them."""
    names = list(settings.variants)
    if settings.select is None:
        return names
    for pattern in settings.select:
        if not fnmatch.filter(names, pattern):
            raise ConfigError(f"select: {pattern!r} fits no variant; there are {', '.join(names)}")
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in settings.select)]
