"""How much memory a process has taken, and how much hangs on a value."""

import gc
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, ModuleType

import numpy as np
import torch
from torch import Tensor

_NO_VALUE = (type, ModuleType, BuiltinFunctionType)
"""What a program consists of and not its data; from these one would reach all others."""


def peak_bytes() -> int:
    """The most memory that this process has held so far (its resident set), in bytes.

    As the kernel has it. That of ``getrusage`` is also what the process held that this one was started from.
    """
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def held_bytes(value: object) -> int:
    """Bytes of all dense tensors and arrays that are reached from ``value``, gradients too.

    What several share counts once, and a view as the whole that it keeps.
    """
    blocks: dict[int, int] = {}
    seen: set[int] = set()
    left = [value]
    while left:
        found = left.pop()
        if id(found) in seen or isinstance(found, _NO_VALUE):
            continue
        seen.add(id(found))
        if isinstance(found, FunctionType):
            left += [*(found.__closure__ or ()), found.__defaults__]
            continue
        if isinstance(found, Tensor):
            if found.layout == torch.strided and not found.is_meta:
                blocks[found.untyped_storage().data_ptr()] = found.untyped_storage().nbytes()
            if found.is_leaf:
                left.append(found.grad)
        elif isinstance(found, np.ndarray):
            whole = found
            while isinstance(whole.base, np.ndarray):
                whole = whole.base
            blocks[whole.ctypes.data] = whole.nbytes
            if whole.dtype == object:
                left += whole.ravel().tolist()
        left += gc.get_referents(found)
    return sum(blocks.values())
