"""Help and shell completion, from the YAML files as text: both answer at once, since nothing heavy is imported."""

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

from qtrain.settings.conf_dir import choices
from qtrain.settings.tasks import TASKS
from qtrain.utils.suggestions import did_you_mean

USAGE = """\
qtrain: a full-precision vision model in, a small low-bit student out.
  python -m qtrain +experiment=quickstart          minutes, without a network
  python -m qtrain +experiment=NAME key=value group=option"""

MORE = """\
More: --help GROUP explains its options, --help experiment lists experiments,
--cfg job all keys; eval "$(qtrain -sc install=bash)" is completion in bash."""

WIDTH = 80
NO_CHOICES = ("hydra", "recipe")
"""Folders of the configuration that no command names."""

INSTALL = """\
_qtrain() {
  COMPREPLY=($(COMP_LINE="${COMP_LINE:0:COMP_POINT}" qtrain -sc query=bash 2>/dev/null))
}
COMP_WORDBREAKS=${COMP_WORDBREAKS//[=@]/}
complete -o nospace -o default -F _qtrain qtrain"""
"""For bash; in zsh after ``autoload bashcompinit && bashcompinit``."""


def help_text(conf: Path) -> str:
    """What ``--help`` prints: usage, tasks, the names of the groups, and how to see more. It fits a screen."""
    tasks = [f"  {name:<11} {does}" for name, does in TASKS.items()]
    listed = "Groups (group=option): " + ", ".join(_groups(conf))
    groups = textwrap.fill(listed, WIDTH, subsequent_indent="  ")
    return "\n".join([USAGE, "Tasks (task=NAME):", *tasks, groups, MORE])


def group_help(conf: Path, group: str) -> str:
    """What ``--help GROUP`` prints: where the group is chosen, and its options with their first comments.

    Raises ``ValueError`` where there is no such group.
    """
    known = [*_groups(conf), "experiment"]
    if group not in known:
        listed = ", ".join(known)
        raise ValueError(f"--help: there is no group {group!r}{did_you_mean(group, known)}; there are {listed}")
    if group == "experiment":
        head = ["Experiments (+experiment=NAME):"]
    else:
        places = [f"  {key}={option}" for key, option in _places(conf) if key.partition("@")[0] == group]
        head = [f"{group}, by default:", *places, "Options:"] if places else [f"+{group}@PLACE=OPTION. Options:"]
    lines = []
    for option in _options(conf / group):
        lines.append(f"  {option}")
        lines += [f"      {comment}" for comment in _first_comments(conf / group / f"{option}.yaml")]
    return "\n".join([*head, *lines])


def completions(conf: Path, word: str) -> list[str] | None:
    """What ``word`` of a command line may become; ``None`` for a key inside a section, which the config must tell."""
    key, equals, _ = word.partition("=")
    if equals:
        group = key.lstrip("+").partition("@")[0]
        values = list(TASKS) if key == "task" else _options(conf / group) if (conf / group).is_dir() and group else None
        return None if values is None else [found for value in values if (found := f"{key}={value}").startswith(word)]
    if "." in key and "@" not in key:
        return None
    known = ["+experiment=", *(f"{key}=" for key, _ in _places(conf)), *_root_keys(conf)]
    return sorted({candidate for candidate in known if candidate.startswith(word)})


def _groups(conf: Path) -> list[str]:
    hidden = (*NO_CHOICES, "experiment")
    return sorted(path.name for path in conf.iterdir() if path.is_dir() and path.name not in hidden)


def _places(conf: Path) -> Iterator[tuple[str, str]]:
    """(``group`` or ``group@place``, option) of each choice in the root config."""
    for group, place, option in choices(conf):
        yield group if place == group else f"{group}@{place}", option


def _root_keys(conf: Path) -> list[str]:
    """``seed=`` for a key, ``fit.`` for a section."""
    found = re.findall(r"^(\w+):(.*)$", (conf / "config.yaml").read_text(encoding="utf-8"), re.MULTILINE)
    return [f"{key}{'=' if rest.partition('#')[0].strip() else '.'}" for key, rest in found if key != "defaults"]


def _options(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def _first_comments(file: Path) -> list[str]:
    """The comment lines that a file opens with, without Hydra's directive."""
    comments = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if text := line.lstrip("# ").rstrip():
            if text.startswith("@package"):
                continue
            comments.append(text)
    return comments
