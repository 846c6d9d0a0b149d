"""How much memory a process has taken, and how much hangs on a value."""

import gc
import resource
import sys
from types import BuiltinFunctionType, FunctionType, ModuleType

import numpy as np
from torch import Tensor

_NO_VALUE = (type, ModuleType, FunctionType, BuiltinFunctionType)
"""What a program consists of and not its data; from these one would reach all others."""


def peak_bytes() -> int:
    """The most memory that this process has held so far (its resident set), in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def held_bytes(value: object) -> int:
    """Bytes of all tensors and arrays that are reached from ``value``; what several share counts once."""
    storages: dict[int, int] = {}
    seen: set[int] = set()
    left = [value]
    while left:
        found = left.pop()
        if id(found) in seen or isinstance(found, _NO_VALUE):
            continue
        seen.add(id(found))
        if isinstance(found, Tensor):
            storage = found.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(found, np.ndarray) and found.base is None:
            storages[found.ctypes.data] = found.nbytes
        left += gc.get_referents(found)
    return sum(storages.values())
