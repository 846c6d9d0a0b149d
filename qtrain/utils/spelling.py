"""Values and code as text that another process would spell alike, so that a hash can tell whether they are the same."""

import dataclasses
import functools
import hashlib
import sys
import types
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qtrain.utils.user_code import PACKAGE

STANDARD_LIBRARY = str(Path(dataclasses.__file__).resolve().parent)


def spelled_plain(value: Any) -> str | None:
    """A plain value, a list of such, or the name of a class or function; ``None`` for anything else."""
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    if isinstance(value, list | tuple):
        parts = [spelled_plain(part) for part in value]
        return None if None in parts else repr(parts)
    return getattr(value, "__qualname__", None)


def spelled(value: Any, within: tuple[int, ...] = ()) -> str:
    """``value`` with all that it holds: mappings, dataclasses, sets, arrays, functions, objects of a user's classes.

    A tensor has its type and shape, a module its class alone, and so has an object of an installed package. ``within``
    are the ids of what holds ``value``; one of these is not spelled again.
    """
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | torch.dtype | torch.device):
        return repr(value)
    kind = _name(type(value))
    if id(value) in within:
        return f"{kind} again"
    within = (*within, id(value))
    match value:
        case Enum():
            return f"{kind}.{value.name}"
        case Tensor():
            return f"{kind} {value.dtype} {tuple(value.shape)}"
        case np.ndarray():
            return f"{kind} {value.dtype} {value.shape} {hashlib.sha256(value.tobytes()).hexdigest()}"
        case type():
            return _name(value) + _code_of(value)
        case types.FunctionType():
            return f"{value.__module__}.{value.__qualname__}{_code_of(value)}"
        case types.MethodType():
            return f"{spelled(value.__func__, within)} of {spelled(value.__self__, within)}"
        case functools.partial():
            return f"{kind} {spelled([value.func, value.args, value.keywords], within)}"
        case Mapping():
            items = sorted((spelled(key, within), spelled(one, within)) for key, one in value.items())
            return f"{kind} {items}"
        case set() | frozenset():
            return f"{kind} {sorted(spelled(one, within) for one in value)}"
        case list() | tuple():
            return f"{kind} {[spelled(one, within) for one in value]}"
        case nn.Module():
            return kind
    held = dataclasses.is_dataclass(value) or isinstance(value, types.SimpleNamespace) or is_users(type(value))
    return f"{kind} {spelled(dict(_fields(value)), within)}" if held else kind


def code_digest(kind: type) -> str | None:
    """SHA-256 of the methods of ``kind`` that are a user's own, those it inherits included; ``None`` without any."""
    codes = [
        f"{_name(base)}.{name} {_spelled_code(code)}"
        for base in kind.__mro__
        if is_users(base)
        for name, member in sorted(vars(base).items())
        for code in _codes(member)
    ]
    return hashlib.sha256("\n".join(codes).encode()).hexdigest() if codes else None


def is_users(thing: Any) -> bool:
    """Whether a class or function is a user's own: neither Python's, nor an installed package's, nor qtrain's."""
    name = getattr(thing, "__module__", None) or "builtins"
    if name.split(".")[0] in sys.stdlib_module_names and name != "__main__":
        return False
    file = getattr(sys.modules.get(name), "__file__", None)
    if file is None:
        return True  # a notebook's, for instance
    path = str(Path(file).resolve())
    return not (path.startswith((PACKAGE, STANDARD_LIBRARY)) or "-packages" in path)


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _fields(value: Any) -> Iterator[tuple[str, Any]]:
    yield from getattr(value, "__dict__", {}).items()
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name != "__weakref__" and hasattr(value, name):
                yield name, getattr(value, name)


def _code_of(thing: Any) -> str:
    """The digest of a user's class or function, after a space; nothing for others, whose name says which they are."""
    if not is_users(thing):
        return ""
    if isinstance(thing, type):
        return f" {code_digest(thing)}"
    return f" {hashlib.sha256(_spelled_code(thing.__code__).encode()).hexdigest()}"


def _codes(member: Any) -> Iterator[types.CodeType]:
    """The code of a method, however it is wrapped."""
    if isinstance(member, property):
        for part in (member.fget, member.fset):
            yield from _codes(part)
    elif (inner := getattr(member, "__func__", getattr(member, "__wrapped__", member))) is not member:
        yield from _codes(inner)
    elif isinstance(member, types.FunctionType):
        yield member.__code__


def _spelled_code(code: types.CodeType) -> str:
    """What ``code`` does; not where it stands, nor the order in which a set of constants happens to lie."""
    constants = [_spelled_code(one) if isinstance(one, types.CodeType) else spelled(one) for one in code.co_consts]
    return f"{code.co_code.hex()} {code.co_names} {code.co_varnames} {code.co_freevars} {constants}"
