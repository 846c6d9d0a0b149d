"""What a stored tensor is, as JSON: with the description and its bytes, :func:`unpack` gives the tensor again.

The same spelling serves for the value types around it (granularity, blocks) and for the constructor of a quantizer with
its options. Classes are named by their dotted path, so a kind of storage that is added later needs no edit here.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qtrain.storage.base import QTensor
from qtrain.utils.importing import import_object, path_of

VALUES = ("qtrain.storage", "qtrain.spec")
"""Where the classes that a description names are defined."""

DEEPEST = 32
"""Levels of values in values that a description may have; a quantizer in wrappers has far fewer."""

Plain = Any
"""What JSON holds: null, bool, number, string, list, and dict with string keys."""


def describe(value: Any) -> Plain:
    """``value`` as JSON holds it: a plain value, a sequence, a dataclass, a type of numbers, a class, or a constructor.

    Of a :class:`QTensor`, the tensors that are stored are described by shape and type, the others (levels that follow
    from the method) by their values. Raises ``ValueError`` for anything else.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, QTensor):
        return {"type": path_of(type(value)), "fields": _fields(value, stored=value.parts().keys())}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, Tensor):
        return {"values": value.tolist(), **describe(value.dtype)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {"type": path_of(type(value)), "fields": _fields(value, stored=())}
    if isinstance(value, partial) and isinstance(value.func, type):
        return {"call": path_of(value.func), "options": {key: describe(v) for key, v in value.keywords.items()}}
    if isinstance(value, type):
        return {"call": path_of(value), "options": {}}
    if isinstance(value, Sequence):
        return [describe(item) for item in value]
    raise ValueError(f"a {type(value).__name__} has no place in a file; give plain values")


def restore(plain: Plain, *, admitted: Sequence[str] = VALUES, levels: int = DEEPEST) -> Any:
    """The value that :func:`describe` was given; a sequence becomes a tuple.

    Stored tensors are without values (on the device ``meta``), for :func:`unpack` to be given as ``like``. Only classes
    that are defined in the ``admitted`` packages are called, dataclasses for values and others when the constructor is.
    Raises ``ValueError`` for anything else, and for more than ``levels`` of values in values.
    """
    if not levels:
        raise ValueError(f"a description of more than {DEEPEST} levels is none of a quantizer; the file was changed")
    inner = partial(restore, admitted=admitted, levels=levels - 1)
    if isinstance(plain, list):
        return tuple(map(inner, plain))
    if not isinstance(plain, Mapping):
        return plain
    if "shape" in plain:
        device = "meta" if 0 not in plain["shape"] else "cpu"  # an empty tensor has nothing to wait for
        return torch.empty(plain["shape"], dtype=_dtype(plain["dtype"]), device=device)
    if "values" in plain:
        return torch.tensor(plain["values"], dtype=_dtype(plain["dtype"]))
    if "dtype" in plain:
        return _dtype(plain["dtype"])
    path, given = (plain["type"], plain["fields"]) if "type" in plain else (plain["call"], plain["options"])
    target = import_object(path, admitted=admitted)
    if not isinstance(target, type) or ("type" in plain) != dataclasses.is_dataclass(target):
        raise ValueError(f"{path} is no class of {'values' if 'type' in plain else 'quantizers'}")
    arguments = {name: inner(item) for name, item in given.items()}
    return target(**arguments) if "type" in plain else partial(target, **arguments)


def _fields(value: Any, *, stored: Any) -> dict[str, Plain]:
    described = {}
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        if field.name in stored and isinstance(item, Tensor):
            described[field.name] = {"shape": list(item.shape), **describe(item.dtype)}
        else:
            described[field.name] = describe(item)
    return described


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"there is no type of numbers {name!r}")
    return found
