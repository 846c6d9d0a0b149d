"""Frozen dataclasses from what JSON holds, each value checked against its annotation."""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def from_plain(kind: type[T], plain: Any, name: str) -> T:
    """``plain`` as a ``kind``: a dataclass, or one of the types that :func:`_checked` lists; ``name`` is for messages.

    Lists become tuples. Raises ``ValueError`` in one line where a field is missing, unknown or of another type.
    """
    made: T = _checked(kind, plain, name)
    return made


def _checked(kind: Any, plain: Any, name: str) -> Any:
    """``plain`` as a dataclass, ``X | None``, ``tuple[X, ...]``, ``dict[str, X]``, a string, a number, or ``Any``."""
    if kind is Any:
        return plain
    origin, of = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return _one_of(of, plain, name)
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, plain, name)
    if origin is tuple and isinstance(plain, list):
        return tuple(_checked(of[0], item, f"{name}[{i}]") for i, item in enumerate(plain))
    if origin is dict and isinstance(plain, Mapping):
        return {key: _checked(of[1], item, f"{name}[{key!r}]") for key, item in plain.items()}
    if kind is float and type(plain) in (int, float):
        if not math.isfinite(plain):
            raise ValueError(f"{name} is {plain}, not a finite number")
        return float(plain)
    if origin is None and kind is not float and type(plain) is kind:
        return plain
    raise ValueError(f"{name} is {type(plain).__name__}, not {_spelled(kind)}")


def _one_of(kinds: tuple[Any, ...], plain: Any, name: str) -> Any:
    if plain is None and types.NoneType in kinds:
        return None
    if type(plain) in kinds:
        return plain
    return _checked(next(kind for kind in kinds if kind is not types.NoneType), plain, name)


def _dataclass(kind: Any, plain: Any, name: str) -> Any:
    if not isinstance(plain, Mapping):
        raise ValueError(f"{name} is {type(plain).__name__}, not the fields of {kind.__name__}")
    hints = typing.get_type_hints(kind)
    needed = {f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING}
    if missing := sorted(needed - plain.keys()):
        raise ValueError(f"{name} lacks {', '.join(missing)}")
    if unknown := sorted(plain.keys() - hints.keys()):
        raise ValueError(f"{name} has {', '.join(map(repr, unknown))}, which is not known")
    return kind(**{key: _checked(hints[key], item, f"{name}.{key}") for key, item in plain.items()})


def _spelled(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind)
