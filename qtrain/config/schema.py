"""The schema of the YAML files, derived from the settings that the package works with."""

import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import Field, field, fields, is_dataclass, make_dataclass
from functools import cache
from typing import Any

import omegaconf

from qtrain.settings.component import Component
from qtrain.settings.run_settings import NOT_A_KEY


@cache
def schema_of(settings: type) -> type:
    """A dataclass for OmegaConf with the keys of the frozen dataclass ``settings``.

    A component is ``Any``: its target's signature is its schema. A key without a default must be given by some YAML.
    """
    hints = typing.get_type_hints(settings)
    keys = [one for one in fields(settings) if one.metadata != NOT_A_KEY]
    made: list[tuple[str, Any, Field[Any]]] = [(key.name, *_key(hints[key.name], key)) for key in keys]
    return make_dataclass(settings.__name__, made)


def optional(hint: Any) -> tuple[Any, bool]:
    """The type besides ``None``, and whether ``None`` is admitted."""
    if typing.get_origin(hint) not in (types.UnionType, typing.Union):
        return hint, False
    inner = [part for part in typing.get_args(hint) if part is not types.NoneType]
    return (inner[0], True) if len(inner) == 1 else (hint, False)


def _key(hint: Any, key: Field[Any]) -> tuple[Any, Field[Any]]:
    kind, nullable = optional(hint)
    if is_dataclass(kind) and isinstance(kind, type) and kind is not Component:
        if kind.__name__ == "RunSettings":
            return dict[str, Any], field(default=omegaconf.MISSING)
        nested = schema_of(kind)
        return nested, field(default_factory=nested)
    default = omegaconf.MISSING if key.default is NO_DEFAULT and key.default_factory is NO_DEFAULT else key.default
    if default is NO_DEFAULT:
        default = omegaconf.MISSING
    origin = typing.get_origin(kind) or kind
    if origin is tuple:
        (item, *_) = typing.get_args(kind)
        plain: Any = list[dict[str, Any]] if typing.get_origin(item) is Mapping else list[item]  # type: ignore[valid-type]
        return (plain | None if nullable else plain), field(default=default)
    if origin is Mapping:
        return _mapping(kind), field(default=default)
    if kind is Component:
        return Any, field(default=default)
    return hint, field(default=default)


def _mapping(kind: Any) -> Any:
    _, item = typing.get_args(kind)
    if typing.get_origin(item) is tuple:
        return dict[str, list[str]] | None
    plain = item in (str | None, str)
    return dict[str, item] if plain else dict[str, Any] | None  # type: ignore[valid-type]
