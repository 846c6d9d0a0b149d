"""The jobs of a multirun: what each is composed of, and a folder of its own for each run.

A run's name tells bits, teacher and seed. Whatever else a multirun varies is added to the names of its runs, and jobs
that would share a folder all the same are refused before the first of them starts.
"""

import re
from collections.abc import Iterable, Sequence
from hashlib import sha256
from itertools import product
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from qtrain.config.compose import compose, own_hydra
from qtrain.config.explain import explain
from qtrain.settings.run_settings import RunSettings
from qtrain.utils.errors import ConfigError

IN_NAME = ("seed", "quantize.bits.weight", "quantize.bits.input")
"""Keys whose values the names of runs tell anyway."""

IN_PATH = ("experiment", "output", "name", "run_dir", "task")
"""Keys whose values stand elsewhere in the folders of runs."""

ONE_RUN_IN_A_FOLDER = ("train", "calibrate", "sweep")

LONGEST = 40
"""Characters of one value in a name; a longer one ends in a hash."""


def check_multirun(typed: Sequence[str]) -> None:
    """Compose each job of the command line ``typed``. Raises ``ConfigError`` where one is wrong, or two share a folder.

    Jobs of another sweeper than Hydra's own are not known ahead; then only what all have in common is composed.
    """
    choices = _choices(typed)
    if choices is None:
        compose([text for text in typed if not _parsed(text).is_sweep_override()])
        return
    swept = swept_keys(typed)
    _check_apart(product(*choices), swept)


def swept_keys(typed: Sequence[str]) -> list[str]:
    """The keys of the command line ``typed`` that have several values."""
    found = map(_parsed, typed)
    return [override.get_key_element().lstrip("+") for override in found if override.is_sweep_override()]


def _choices(typed: Sequence[str]) -> list[list[str]] | None:
    """For each key of ``typed`` what jobs are given, in Hydra's order; ``None`` where one is a range of numbers."""
    choices: dict[str, list[str]] = {}
    with own_hydra() as loader:
        for text in typed:
            override, key = _parsed(text), text.partition("=")[0]
            override.config_loader = loader
            if override.is_sweep_override() and not override.is_discrete_sweep():
                return None
            values = override.sweep_string_iterator() if override.is_sweep_override() else None
            choices[key] = [text] if values is None else [f"{key}={value}" for value in values]
    return list(choices.values())


def _parsed(text: str) -> Override:
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException as error:
        raise ConfigError(explain(error)) from error


def named_job(overrides: Sequence[str], swept: Sequence[str]) -> tuple[list[str], RunSettings]:
    """The ``overrides`` of one job, with a ``name`` that tells all keys ``swept`` apart, and the settings they give."""
    settings = compose(overrides)
    if (name := _name(settings, overrides, swept)) is None:
        return list(overrides), settings
    named = [*(text for text in overrides if text.partition("=")[0] != "name"), f"name='{name}'"]
    return named, compose(named)


def _name(settings: RunSettings, overrides: Sequence[str], swept: Sequence[str]) -> str | None:
    """The name of the run of ``settings``, or what is added to the names of its variants; ``None``: as it is."""
    if settings.task not in ONE_RUN_IN_A_FOLDER:
        return None
    derived = settings.task in ("train", "calibrate") and settings.name is None and not settings.variants
    apart = _apart(overrides, [key for key in swept if key not in IN_PATH and not (derived and key in IN_NAME)])
    before = Path(settings.run_dir).name if derived else settings.name
    return "-".join(filter(None, (before, apart))) if apart else None


def _check_apart(jobs: Iterable[Sequence[str]], swept: Sequence[str]) -> None:
    """Raise ``ConfigError`` if two of ``jobs`` would write to one folder, or one file of predictions."""
    seen: dict[str, int] = {}
    for number, overrides in enumerate(jobs):
        settings = compose(overrides)
        places = _places(settings, _name(settings, overrides, swept) or settings.name)
        for place in places:
            if place in seen:
                raise ConfigError(
                    f"-m: jobs {seen[place]} and {number} would both write to {place}; give each value once, and names "
                    "that differ, for instance name='${seed}-${optimizer.lr}'"
                )
        seen |= dict.fromkeys(places, number)


def _places(settings: RunSettings, name: str | None) -> list[str]:
    """Where the job of ``settings`` writes what no other job may touch."""
    if settings.task == "predict":
        return [settings.predict.output] if settings.predict.output else []
    if settings.task not in ONE_RUN_IN_A_FOLDER:
        return []
    folder = Path(settings.run_dir)
    if settings.variants:
        leaves = [variant_name(variant, name) for variant in settings.variants]
    elif settings.task == "sweep":
        leaves = [f"sweep-{name}" if name else folder.name]
    else:
        leaves = [name or folder.name]
    return [str(folder.parent / leaf) for leaf in leaves]


def variant_name(variant: str, name: str | None) -> str:
    """The name of the run of ``variant``; a ``name`` of all of them together follows."""
    return variant if name is None else f"{variant}-{name}"


def _apart(overrides: Sequence[str], keys: Sequence[str]) -> str:
    """``lr0.1-objective-soft``: the values of ``keys`` in ``overrides``; the first seed, 0, goes without saying."""
    given = {key.lstrip("+"): value for key, _, value in (text.partition("=") for text in overrides)}
    parts = []
    for key in keys:
        value = re.sub(r"[^\w.+-]+", "_", given.get(key, "")).strip("_")
        if (key, value) == ("seed", "0"):
            continue
        if len(value) > LONGEST:
            value = f"{value[: LONGEST - 9]}-{sha256(value.encode()).hexdigest()[:8]}"
        place = key.rpartition("@")[2]
        last = place.rpartition(".")[2]
        label = last if [other.rpartition("@")[2].rpartition(".")[2] for other in keys].count(last) == 1 else place
        parts.append(f"{label}{value}" if value[:1].isdigit() else f"{label}-{value}")
    return "-".join(parts)
