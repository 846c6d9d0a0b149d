"""Overrides of a command line as the content of an experiment file."""

from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from qtrain.config.exchange import exchanged_places, lies_in_any
from qtrain.settings.conf_dir import conf_dir


def as_experiment(overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """``overrides`` as the content of an experiment file, and those of them that no file can say.

    Hydra's own settings, what only the command line may say, and deletions are of the latter kind. So is all that is
    about a quantizer in the place of an experiment's: in a file it would not go without that one's options.

    >>> as_experiment(["objective=soft", "optimizer.lr=0.01", "~callbacks"])
    ({'defaults': [{'override /objective': 'soft'}, '_self_'], 'optimizer': {'lr': 0.01}}, ['~callbacks'])
    """
    parser = OverridesParser.create()
    added: list[Any] = []
    replaced: list[Any] = []
    values: dict[str, Any] = {}
    left: list[str] = []
    exchanged = exchanged_places(overrides)
    for text in overrides:
        override = parser.parse_override(text)
        key = str(override.key_or_group)
        only_typed = key == "allow_targets" or key.split(".")[0] == "hydra" or key.rpartition(".")[2] == "builder"
        if override.is_delete() or only_typed or lies_in_any(text, exchanged):
            left.append(text)
        elif _is_group(key):
            place = f"/{key}" + (f"@{override.package}" if override.package else "")
            choice = override.value()
            if override.is_add():
                added.append({place: choice})
            else:
                replaced.append({f"override {place}": choice})
        else:
            _put(values, key, override)
    return {"defaults": [*added, *replaced, "_self_"], **values}, left


def _put(values: dict[str, Any], key: str, override: Override) -> None:
    """Set ``key``, a dotted path, as Hydra would: a mapping is merged with what stands there."""
    *path, last = key.split(".")
    for part in path:
        if not isinstance(values.get(part), dict):
            values[part] = {}
        values = values[part]
    value, before = override.value(), values.get(last)
    values[last] = {**before, **value} if isinstance(before, dict) and isinstance(value, dict) else value


def _is_group(key: str) -> bool:
    return (conf_dir() / key).is_dir()
