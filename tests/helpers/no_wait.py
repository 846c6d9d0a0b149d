"""A mode in which everything fails that makes the host wait for a number of a GPU, also on a machine without one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

WAITING = {
    aten._local_scalar_dense.default,  # item(), float(), int() and bool() of a tensor, and an index by a tensor
    aten.is_nonzero.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.bincount.default,
}
"""Operators whose result, or its shape, the host must know before it goes on."""


class NoWait(TorchDispatchMode):
    """Inside, an operator of :data:`WAITING`, or an index by a mask, is an error."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masks = any(isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1]) if _indexes(func) else False
        if func in WAITING or masks:
            raise AssertionError(f"{func} makes the host wait for the device")
        return func(*args, **(kwargs or {}))


def _indexes(func: Any) -> bool:
    return func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
