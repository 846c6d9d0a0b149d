"""From command-line overrides to a config that can run, or to one line that says why not.

The command line, a test and a sweep all come through :func:`compose`. Hydra puts the YAML together, once; the result
is held against the schema, each constructor call in it against a signature, and becomes :class:`RunSettings`.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from qtrain.config.exchange import compose_exchanging
from qtrain.config.explain import check_choices, check_searchpath, explain
from qtrain.config.instantiate import settings_of
from qtrain.config.ranges import check_deletions, check_values
from qtrain.config.run_logging import RUN_LOG
from qtrain.config.schema import schema_of
from qtrain.config.targets import check_targets, import_libraries
from qtrain.settings.component import called_after
from qtrain.settings.conf_dir import conf_dir
from qtrain.settings.run_files import CONFIG, read_config
from qtrain.settings.run_identity import restored, stage_changes
from qtrain.settings.run_settings import RunSettings
from qtrain.settings.tasks import TASKS
from qtrain.utils.errors import ConfigError
from qtrain.utils.suggestions import did_you_mean

FOLDS = ("none", "before", "training")
CALIBRATIONS = ("images", "statistics")

BUILDER = "builder"
"""Last part of the keys that name code of the user's own."""

LABELS_ALONE = "qtrain.distillation.hard.Hard"
"""The term that no teacher is needed for."""

AD_HOC = "adhoc"
"""Folder of runs that belong to no experiment."""


def compose(overrides: Sequence[str] = (), *, typed: Sequence[str] | None = None) -> RunSettings:
    """The settings that the command line ``overrides`` ask for. Raises :class:`ConfigError`.

    ``typed`` are those that the user has typed, where a config has added others: only what the user types can admit
    code to run.
    """
    return from_config(compose_config(overrides), overrides, typed=typed)


def compose_config(overrides: Sequence[str], *, notes: list[str] | None = None) -> DictConfig:
    """What Hydra makes of ``overrides``, its own section included; nothing is checked yet.

    ``notes`` gets a line for each quantizer of an experiment that they exchange: see :mod:`qtrain.config.exchange`.
    """
    with own_hydra():
        check_deletions(overrides)
        check_searchpath(overrides)
        check_choices(overrides)
        try:
            cfg, exchanges = compose_exchanging(_hydras_config, overrides)
        except (HydraException, OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(explain(error)) from error
    if notes is not None:
        notes += map(str, exchanges)
    return cfg


def _hydras_config(name: str | None, overrides: Sequence[str]) -> DictConfig:
    return hydra.compose(name, overrides=list(overrides), return_hydra_config=True)


def from_config(cfg: DictConfig, overrides: Sequence[str], *, typed: Sequence[str] | None = None) -> RunSettings:
    """The settings of ``cfg``, that Hydra composed of ``overrides``, with each of its stages composed as well.

    ``typed`` as for :func:`compose`. Raises :class:`ConfigError` unless every key, value, choice and target is right.
    """
    cfg = cfg.copy()
    with open_dict(cfg):
        if own := cfg.pop("hydra", None):
            _check_hydra(OmegaConf.to_container(own, resolve=False))
    typed = overrides if typed is None else typed
    if cfg.get("allow_targets") and not any(_key(one) == "allow_targets" for one in typed):
        raise ConfigError("allow_targets: may be given on the command line only, not by a YAML file; remove it there")
    named = typed_builders(typed)
    settings = _checked(_admitting(cfg, named))
    written = OmegaConf.to_container(cfg.stages, resolve=False) if cfg.stages else {}
    assert isinstance(written, dict)
    if not written:
        return settings
    changes = {str(name): _stage_changes(settings, str(name), own, overrides, named) for name, own in written.items()}
    return _with_stages(settings, changes)


def from_plain(plain: Mapping[str, Any], *, allow: Sequence[str] | None = None) -> RunSettings:
    """The settings of a config that was resolved before: that of a run's folder, or of a sweep's trial.

    ``allow`` stands in for the ``allow_targets`` of the config itself. Raises :class:`ConfigError`.
    """
    given = dict(plain)
    if allow is not None:
        given["allow_targets"] = list(allow)
    changes = given.pop("stages", None) or {}
    return _with_stages(_checked(OmegaConf.create({**given, "stages": {}})), changes)


def read_run(folder: Path, like: RunSettings) -> RunSettings:
    """The settings of the run in ``folder``; what its config does not hold, since it is no part of it, is as in
    ``like``.

    Raises :class:`ConfigError` for a damaged config, and for targets that the command line of ``like`` does not admit.
    """
    return from_plain(restored(read_config(folder / CONFIG), like.plain), allow=like.allow_targets)


def _with_stages(settings: RunSettings, changes: Mapping[str, Mapping[str, Any]]) -> RunSettings:
    """``settings`` with a stage for each of ``changes``: sections in which its config differs, by the stage's name."""
    stages = {
        name: _checked(OmegaConf.create({**settings.plain, **own, "stages": {}})) for name, own in changes.items()
    }
    return replace(settings, stages=stages, plain={**settings.plain, "stages": changes})


def typed_builders(typed: Sequence[str]) -> list[str]:
    """The code that the command line ``typed`` names itself, as in ``model.builder=mypackage.build``."""
    values = (
        OverridesParser.create().parse_override(one).value()
        for one in typed
        if BUILDER in one and _key(one).rpartition(".")[2] == BUILDER
    )
    return list(dict.fromkeys(value for value in values if isinstance(value, str)))


def _admitting(cfg: DictConfig, named: Sequence[str]) -> DictConfig:
    """``cfg`` with the targets ``named`` admitted besides those that it admits anyway."""
    if named:
        with open_dict(cfg):
            cfg.allow_targets = list(dict.fromkeys([*(cfg.get("allow_targets") or ()), *named]))
    return cfg


def _stage_changes(
    run: RunSettings, name: str, own: Any, overrides: Sequence[str], named: Sequence[str]
) -> dict[str, Any]:
    if not isinstance(own, list) or not all(isinstance(override, str) for override in own):
        raise ConfigError(f"stages.{name}: must be a list of overrides such as [fit.epochs=2], got {own}")
    _check_admitted(f"stages.{name}", own)
    try:
        cfg = compose_config([*overrides, *own])
        with open_dict(cfg):
            cfg.pop("hydra")
        stage = _checked(_admitting(cfg, named))
    except ConfigError as error:
        raise ConfigError(f"stages.{name}: {error}") from error
    return stage_changes(run.plain, stage.plain, name)


def _checked(cfg: DictConfig) -> RunSettings:
    """``cfg`` held against the schema, and each constructor call in it against a signature; stages are left out."""
    try:
        typed = OmegaConf.merge(OmegaConf.structured(schema_of(RunSettings)), cfg)
        if missing := sorted(OmegaConf.missing_keys(typed)):
            raise ConfigError(f"missing: give {', '.join(f'{key}=...' for key in missing)}")
        full = OmegaConf.to_container(typed, resolve=True)
        plain = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from error
    assert isinstance(full, dict) and isinstance(plain, dict)
    check_values({str(key): value for key, value in full.items()})
    _check_choice("task", full["task"], TASKS)
    _check_choice("quantize.fold", full["quantize"]["fold"], dict.fromkeys(FOLDS))
    _check_choice("quantize.calibration", full["quantize"]["calibration"], dict.fromkeys(CALIBRATIONS))
    _check_choice("budget", full["budget"], full["budgets"])
    if full["teacher"]["learns"] and full["teacher"]["shard"]:
        raise ConfigError("teacher.shard: a teacher that learns is whole on each process; leave one of the two false")
    if full["fit"]["shard"]:
        _check_sharded(full)
    for name, variant in (full["variants"] or {}).items():
        _check_admitted(f"variants.{name}", variant)
    allow = full["allow_targets"]
    import_libraries()
    check_targets(full, allow=allow)
    return settings_of(
        {str(key): value for key, value in full.items()},
        plain={str(key): value for key, value in plain.items()},
        allow=allow,
    )


def _check_sharded(plain: dict[Any, Any]) -> None:
    """Refuse what a student that is spread over processes cannot have."""
    fit, alone = plain["fit"], "whole on each process; leave one of the two as it was"
    strategy = plain["trainer"]["strategy"]
    refused = {
        "fit.compile=true": fit["compile"] is True,
        "fit.clip_norm": fit["clip_norm"] is not None,
        "fit.weight_average": fit["weight_average"] is not None,
        "teacher.learns=true": plain["teacher"]["learns"],
        f"trainer.strategy={strategy}": strategy not in ("auto", "ddp"),
        "task=sweep": plain["task"] == "sweep",
    }
    for key, given in refused.items():
        if given:
            raise ConfigError(f"fit.shard: {key} is for a student that is {alone}")


@contextmanager
def own_hydra() -> Iterator[ConfigLoader]:
    """Hydra's global state set up for composing, and put back: a task composes while ``hydra.main`` is running."""
    holder = GlobalHydra.instance()
    outer = holder.hydra
    holder.clear()
    try:
        with hydra.initialize_config_dir(str(conf_dir()), job_name="qtrain", version_base="1.3"):
            yield holder.config_loader()
    finally:
        GlobalHydra.instance().hydra = outer


def _check_choice(key: str, value: str, choices: Mapping[str, Any]) -> None:
    if value not in choices:
        raise ConfigError(f"{key}: must be one of {', '.join(choices)}, got {value!r}{did_you_mean(value, choices)}")


def _check_admitted(where: str, overrides: Sequence[str]) -> None:
    for override in overrides:
        # To parse is slow and variants are many: what does not hold the words at all cannot have them as its key.
        suspect = "allow_targets" in override or "hydra" in override
        if suspect and (_key(override) == "allow_targets" or _key(override).startswith("hydra")):
            raise ConfigError(f"{where}: {override!r} may be given on the command line only")


def _check_hydra(node: Any, where: str = "hydra") -> None:
    """Hydra's own section can start code as well: its callbacks and launchers, and the factories of logging."""
    items = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        _check_hydra(value, f"{where}.{key}")
        admitted = {"_target_": ("hydra.", "hydra_plugins."), "class": ("logging.", RUN_LOG), "()": ()}.get(str(key))
        if admitted is not None and not str(value).startswith(admitted):
            raise ConfigError(f"{where}.{key}: {value!r} is not admitted here; remove it")


@cache
def _key(override: str) -> str:
    parsed = OverridesParser.create().parse_override(override)
    return str(parsed.key_or_group)


def _run_name(root: DictConfig) -> str:
    """What tells runs of one experiment apart: bits, distillation, and the seed where it is not the first."""
    if root.name:
        return str(root.name)
    bits = root.quantize.bits
    if not root.quantize.enabled:
        name = "fp"
    elif root.many_bits.widths:
        name = "many" + "-".join(map(str, root.many_bits.widths))
    elif not isinstance(bits, DictConfig):
        name = "quantized"  # an error that is told where choices become components
    elif "weight" in bits and "input" in bits and not bits.get("layers"):
        name = f"w{bits.weight}a{bits.input}"
    else:
        name = str(bits.get("_target_", "quantized")).rpartition(".")[2].lower()
    if root.task == "calibrate":
        name += "-calibrated"
    elif _learns_from_teacher(root):
        name += "-distill"
    return name + (f"-seed{root.seed}" if root.seed else "")


def _learns_from_teacher(root: DictConfig) -> bool:
    """Whether there is a teacher and a term that looks at it; of stages each has terms of its own."""
    if root.teacher.model is None:
        return False
    terms = root.objective.get("terms")
    given = terms.values() if isinstance(terms, DictConfig) else ()  # anything else is told of later
    return bool(root.stages) or any(isinstance(t, DictConfig) and t.get("_target_") != LABELS_ALONE for t in given)


def _run_dir(*, _root_: DictConfig | ListConfig) -> str:
    """Resolver of ``run_dir``: ``<output>/<experiment>/<name>``; reports go where their runs are."""
    assert isinstance(_root_, DictConfig)
    if _root_.task == "report":
        return str(_root_.report.folder)
    leaf = (
        f"{_root_.task}-{_root_.name}"
        if _root_.task in ("allocate", "evaluate", "predict", "sweep") and _root_.name
        else _root_.task
    )
    if _root_.task in ("train", "calibrate"):
        leaf = _run_name(_root_)
    return str(Path(_root_.output) / (_root_.experiment or AD_HOC) / leaf)


OmegaConf.register_new_resolver("qtrain.run_dir", _run_dir, replace=True)
OmegaConf.register_new_resolver("qtrain.called_after", called_after, replace=True)
