"""What Hydra, OmegaConf and YAML say of a mistake, as one line in the user's words."""

import re
from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    OmegaConfBaseException,
    ValidationError,
)
from yaml import MarkedYAMLError

from qtrain.settings.conf_dir import choices, conf_dir
from qtrain.utils.errors import ConfigError
from qtrain.utils.suggestions import did_you_mean, did_you_mean_path

OPTIONS = "options"
"""Last part of the keys of a builder's arguments."""

OPEN = ("allocate.budgets", "sweep.space", "sweep.objectives")
"""Mappings with some keys from the start, to which a user may add others."""

OPTIONS_LISTED = 12
"""Of a group with more options, a message names the nearest alone."""

SEARCHPATH = "hydra.searchpath"
LOCAL = "file://"


def explain(error: BaseException) -> str:
    """An error of Hydra, OmegaConf or a YAML file as one line in the user's words."""
    if isinstance(error, OverrideParseException):
        return _explain_grammar(error)
    if isinstance(error, MarkedYAMLError):
        return _explain_yaml(error)
    if isinstance(error, UnicodeDecodeError):
        return f"a YAML file of the config is no text in UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8"
    if (added := re.search(r"Could not override 'experiment'.*\+experiment=(\S+)", str(error), re.DOTALL)) is not None:
        return _explain_experiment(added[1])
    if isinstance(error, MissingConfigException):
        return _explain_missing_file(error)
    inner: BaseException | None = error
    while inner is not None and not isinstance(inner, OmegaConfBaseException):
        inner = inner.__cause__
    if isinstance(inner, ValidationError):
        return f"{inner.full_key}: {_first_line(inner)}" if inner.full_key else _first_line(inner)
    if isinstance(inner, InterpolationResolutionError):
        return f"{inner.full_key}: cannot be worked out: {_first_line(inner)}"
    if isinstance(inner, ConfigKeyError | ConfigAttributeError) and isinstance(inner.parent_node, DictConfig):
        key = str(inner.full_key or inner.key)
        parent = key.removesuffix(str(inner.key))
        if parent.endswith(f"{OPTIONS}."):
            return f"unknown key {key!r}; an option that is new there is added by a plus: +{key}=..."
        near = did_you_mean(key, [parent + str(name) for name in inner.parent_node])
        plus = f"; a new one is added by a plus: +{key}=..." if parent.rstrip(".") in OPEN else ""
        return f"unknown key {key!r}{near}{plus}"
    causes = [str(error), *([] if inner is None or inner is error else [str(inner)])]
    return ": ".join(" ".join(cause.split()) for cause in causes if cause) or type(error).__name__


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
    if len(options) <= OPTIONS_LISTED:
        near, known = did_you_mean(option, options), f"available: {', '.join(options)}"
    else:
        near, known = did_you_mean_path(option, options), f"python -m qtrain --help {group} lists all {len(options)}"
    return f"{group}={option}: there is no such {group}{near} ({known})"


def check_choices(overrides: Sequence[str]) -> None:
    """Raise ``ConfigError`` where ``overrides`` give null for a choice from a group, which Hydra does not explain."""
    for text in overrides:
        key, _, value = text.partition("=")
        if value.strip() == "null" and (conf_dir() / key.partition("@")[0].lstrip("+")).is_dir():
            raise ConfigError(not_a_choice(key.lstrip("+").rpartition("@")[2], None))


def check_searchpath(overrides: Sequence[str]) -> None:
    """Raise ``ConfigError`` where ``overrides`` name a folder of configs that does not exist."""
    for text in overrides:
        if not text.startswith(f"{SEARCHPATH}="):
            continue
        try:
            given = OverridesParser.create().parse_override(text).value()
        except HydraException as error:
            raise ConfigError(explain(error)) from error
        for place in given if isinstance(given, list) else [given]:
            folder = str(place).removeprefix(LOCAL)
            if "://" not in folder and not (str(place).startswith(LOCAL) and Path(folder).is_dir()):
                lacks = f"there is no folder {folder}" if str(place).startswith(LOCAL) else f"{place!r} is no place"
                raise ConfigError(f"{SEARCHPATH}: {lacks}; give a folder of configs, as in [{LOCAL}/home/me/conf]")


def not_a_choice(key: str, value: object) -> str:
    """Why ``value`` cannot stand at ``key``, where a choice from a group belongs, and how to choose one."""
    group = next((group for group, place, _ in choices(conf_dir()) if place == key), None)
    if value is None:
        there = f"; write {group}@{key}=..." if group not in (None, key) else f"; write {key}=..." if group else ""
        return f"{key}: must be a choice from a group, and not null{there}"
    if group is not None:
        options = [path.stem for path in (conf_dir() / group).glob("*.yaml")]
        if value in options:
            return f"{key}: {value} is an option of the group {group}; write {group}@{key}={value}"
        return f"{key}: a choice from the group {group} stands here, got {value!r}{did_you_mean(str(value), options)}"
    groups = sorted(path.parent.name for path in conf_dir().glob(f"*/{value}.yaml"))
    if groups:
        ways = " or ".join(f"+{group}@{key}={value}" for group in groups)
        return f"{key}: {value} is an option of a group; write {ways}"
    return f"{key}: a choice from a group stands here, got {value!r}; write +GROUP@{key}=OPTION"


def _explain_grammar(error: OverrideParseException) -> str:
    key, equals, value = str(error.override).partition("=")
    if not equals or not key:
        return f"{error.override!r} is no setting; give key=value, for instance seed=1"
    if value.startswith(("[", "{", "'", '"')):
        return f"{key}: {value} cannot be read as a list, a mapping or a text; close what it opens"
    quoted = value.replace("\\", "\\\\").replace('"', '\\"')
    return f"{key}: {value} holds characters that need quotes; in a shell write '{key}=\"{quoted}\"'"


def _explain_yaml(error: MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    where = "a YAML file" if mark is None else f"{mark.name}, line {mark.line + 1}"
    problem = str(error.problem or error.context)
    if "'\\t'" in problem:
        return f"{where}: there is a tab; YAML is indented by spaces"
    if "could not determine a constructor" in problem:
        tag = problem.rpartition("tag ")[2].replace("tag:yaml.org,2002:", "!!")
        return f"{where}: the tag {tag} makes an object; a config holds plain values only, so remove it"
    return f"{where}: {_first_line(Exception(problem))}; this is not valid YAML"


def _explain_experiment(name: str) -> str:
    if (conf_dir() / "experiment" / f"{name}.yaml").is_file():
        return f"experiment={name}: an experiment is added by a plus: +experiment={name}"
    folder = conf_dir() / "experiment"
    known = [path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml")]
    return (
        f"experiment={name}: there is no such experiment{did_you_mean(name, known)}; one that exists is added by "
        f"a plus, +experiment=NAME, and runs of your own are kept together by output=outputs/{name}"
    )
