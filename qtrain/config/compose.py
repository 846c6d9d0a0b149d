"""From command-line overrides to a config that can run, or to one line that says why not.

The command line, a test and a sweep all come through :func:`compose`. Hydra puts the YAML together;
:func:`validate` holds the result against the schema, and each constructor call in it against a signature.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    OmegaConfBaseException,
    ValidationError,
)

from qtrain.config.targets import check_targets
from qtrain.settings.conf_dir import conf_dir
from qtrain.settings.run_identity import changes
from qtrain.settings.schema import Root
from qtrain.settings.tasks import TASKS
from qtrain.utils.errors import ConfigError
from qtrain.utils.suggestions import did_you_mean

FOLDS = ("none", "before", "training")
CALIBRATIONS = ("images", "statistics")

AD_HOC = "adhoc"
"""Folder of runs that belong to no experiment."""


def compose(overrides: Sequence[str] = ()) -> DictConfig:
    """The validated config that the command line ``overrides`` ask for. Raises :class:`ConfigError`.

    Its ``stages``, lists of overrides in YAML, are worked out: each holds the sections in which it differs.
    """
    return with_stages(_compose(overrides), overrides)


def with_stages(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """``cfg``, that ``overrides`` led to, with its stages worked out; in place."""
    if cfg.stages:
        cfg.stages = {name: _stage(cfg, name, [*overrides, *own]) for name, own in _stage_overrides(cfg).items()}
    return cfg


def _stage(cfg: DictConfig, name: str, overrides: Sequence[str]) -> dict[str, Any]:
    try:
        stage = _compose(overrides)
    except ConfigError as error:
        raise ConfigError(f"stages.{name}: {error}") from error
    return changes(cfg, stage, name)


def _stage_overrides(cfg: DictConfig) -> dict[str, list[str]]:
    for name, own in cfg.stages.items():
        if not isinstance(own, ListConfig) or not all(isinstance(override, str) for override in own):
            raise ConfigError(f"stages.{name}: must be a list of overrides such as [fit.epochs=2], got {own}")
        _check_admitted(f"stages.{name}", own)
    plain = OmegaConf.to_container(cfg.stages, resolve=False)
    assert isinstance(plain, dict)
    return {str(name): list(own) for name, own in plain.items()}


def _compose(overrides: Sequence[str]) -> DictConfig:
    """What :func:`compose` gives, its stages still as they are written."""
    with _own_hydra():
        try:
            cfg = hydra.compose("config", overrides=list(overrides), return_hydra_config=True)
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(explain(error)) from error
    with open_dict(cfg):
        _check_hydra(OmegaConf.to_container(cfg.pop("hydra"), resolve=False))
    validate(cfg, overrides)
    return cfg


def validate(cfg: DictConfig, overrides: Sequence[str] = ()) -> None:
    """Raise :class:`ConfigError` unless every key, value, choice and target of ``cfg`` is right.

    ``overrides`` are those that led to ``cfg``: what only the command line may say is looked for there.
    """
    try:
        typed = OmegaConf.merge(OmegaConf.structured(Root), cfg)
        if missing := sorted(OmegaConf.missing_keys(typed)):
            raise ConfigError(f"missing: give {', '.join(f'{key}=...' for key in missing)}")
        plain = OmegaConf.to_container(typed, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from error
    assert isinstance(plain, dict)
    _check_choice("task", plain["task"], TASKS)
    _check_choice("quantize.fold", plain["quantize"]["fold"], dict.fromkeys(FOLDS))
    _check_choice("quantize.calibration", plain["quantize"]["calibration"], dict.fromkeys(CALIBRATIONS))
    _check_choice("budget", plain["budget"], plain["budgets"])
    if plain["teacher"]["learns"] and plain["teacher"]["shard"]:
        raise ConfigError("teacher.shard: a teacher that learns is whole on each process; leave one of the two false")
    if plain["fit"]["shard"]:
        _check_sharded(plain)
    if plain["allow_targets"] and not any(_key(override) == "allow_targets" for override in overrides):
        raise ConfigError("allow_targets: may be given on the command line only, not by a YAML file; remove it there")
    for name, variant in (plain["variants"] or {}).items():
        _check_admitted(f"variants.{name}", variant)
    check_targets(plain, allow=plain["allow_targets"])


def _check_sharded(plain: dict[Any, Any]) -> None:
    """Refuse what a student that is spread over processes cannot have."""
    fit, alone = plain["fit"], "whole on each process; leave one of the two as it was"
    strategy = plain["trainer"]["strategy"]
    refused = {
        "fit.compile=true": fit["compile"],
        "fit.clip_norm": fit["clip_norm"] is not None,
        "fit.weight_average": fit["weight_average"] is not None,
        "teacher.learns=true": plain["teacher"]["learns"],
        f"trainer.strategy={strategy}": strategy not in ("auto", "ddp"),
        "task=sweep": plain["task"] == "sweep",
    }
    for key, given in refused.items():
        if given:
            raise ConfigError(f"fit.shard: {key} is for a student that is {alone}")


def explain(error: BaseException) -> str:
    """An error of Hydra or OmegaConf as one line in the user's words."""
    if isinstance(error, MissingConfigException):
        return _explain_missing_file(error)
    inner: BaseException | None = error
    while inner is not None and not isinstance(inner, OmegaConfBaseException):
        inner = inner.__cause__
    if isinstance(inner, ValidationError):
        return f"{inner.full_key}: {_first_line(inner)}"
    if isinstance(inner, InterpolationResolutionError):
        return f"{inner.full_key}: cannot be worked out: {_first_line(inner)}"
    if isinstance(inner, ConfigKeyError | ConfigAttributeError) and isinstance(inner.parent_node, DictConfig):
        key = str(inner.full_key or inner.key)
        parent = key.removesuffix(str(inner.key))
        return f"unknown key {key!r}{did_you_mean(key, [parent + str(name) for name in inner.parent_node])}"
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def _own_hydra() -> Iterator[None]:
    """Hydra's global state set up for composing, and put back: a task composes while ``hydra.main`` is running."""
    holder = GlobalHydra.instance()
    outer = holder.hydra
    holder.clear()
    try:
        with hydra.initialize_config_dir(str(conf_dir()), job_name="qtrain", version_base="1.3"):
            yield
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
        admitted = {"_target_": ("hydra.", "hydra_plugins."), "class": ("logging.",), "()": ()}.get(str(key))
        if admitted is not None and not str(value).startswith(admitted):
            raise ConfigError(f"{where}.{key}: {value!r} is not admitted here; remove it")


@cache
def _key(override: str) -> str:
    parsed = OverridesParser.create().parse_override(override)
    return str(parsed.key_or_group)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0]


def _explain_missing_file(error: MissingConfigException) -> str:
    if str(error.missing_cfg_file).startswith("hydra/launcher/submitit"):
        return "hydra/launcher=slurm: needs a package that is not installed: pip install 'qtrain[slurm]'"
    group, _, option = str(error.missing_cfg_file or "").partition("/")
    folder = conf_dir() / group
    options = sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))
    if not option or not options:
        return " ".join(str(error).split())
    return (
        f"{group}={option}: there is no such {group}{did_you_mean(option, options)} (available: {', '.join(options)})"
    )


def _run_name(root: DictConfig) -> str:
    """What tells runs of one experiment apart: bits, distillation, and the seed where it is not the first."""
    if root.name:
        return str(root.name)
    bits = root.quantize.bits
    if not root.quantize.enabled:
        name = "fp"
    elif "weight" in bits and "input" in bits and not bits.get("layers"):
        name = f"w{bits.weight}a{bits.input}"
    else:
        name = str(bits.get("_target_", "quantized")).rpartition(".")[2].lower()
    if root.task == "calibrate":
        name += "-calibrated"
    elif root.teacher.model is not None:
        name += "-distill"
    return name + (f"-seed{root.seed}" if root.seed else "")


def _run_dir(*, _root_: DictConfig | ListConfig) -> str:
    """Resolver of ``run_dir``: ``<output>/<experiment>/<name>``; reports go where their runs are."""
    assert isinstance(_root_, DictConfig)
    if _root_.task == "report":
        return str(_root_.report.folder)
    leaf = f"{_root_.task}-{_root_.name}" if _root_.task in ("evaluate", "sweep") and _root_.name else _root_.task
    if _root_.task in ("train", "calibrate"):
        leaf = _run_name(_root_)
    return str(Path(_root_.output) / (_root_.experiment or AD_HOC) / leaf)


OmegaConf.register_new_resolver("qtrain.run_dir", _run_dir, replace=True)
