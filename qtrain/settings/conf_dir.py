"""Where the YAML files of the configuration lie."""

import re
from collections.abc import Iterator
from pathlib import Path

PLACE = re.compile(r"^  - (\w+)(?:@([\w.]+))?: (\w+)", re.MULTILINE)
"""A line of the root config's defaults: group, place, option."""


def conf_dir() -> Path:
    """The folder of YAML files: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "conf"
    return inside if (inside / "config.yaml").is_file() else package.parent / "conf"


def choices(conf: Path) -> Iterator[tuple[str, str, str]]:
    """(group, place, option) of each choice that the root config makes; a place may be the group's own."""
    root = conf / "config.yaml"
    for group, place, option in PLACE.findall(root.read_text(encoding="utf-8") if root.is_file() else ""):
        yield group, place or group, option
