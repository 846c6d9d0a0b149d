"""Arithmetic in 32 bits that comes out the same on every processor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

WIDENED = {
    F.conv2d, F.linear, F.batch_norm, F.softmax, F.log_softmax, F.cross_entropy, F.kl_div, F.mse_loss,
    torch.conv2d, torch.matmul, torch.softmax, torch.log_softmax, torch.sum, torch.mean, torch.var, torch.std,
    Tensor.matmul, Tensor.softmax, Tensor.log_softmax, Tensor.sum, Tensor.mean, Tensor.var, Tensor.std,
}  # fmt: skip
"""What adds many numbers up, or works out an exponential: in an order and by a formula that the processor chooses."""


class WideSums(TorchFunctionMode):
    """Works out ``WIDENED`` in 64 bits where it is asked for in 32, and rounds the result.

    A fit may have 64 bits throughout; calibration, a teacher and synthetic images have 32. There two processors differ
    in the last bit, which moves a value over the edge of a code now and then, and with it the loss by far more.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[Any], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if func not in WIDENED or named.get("training", False) or not _single(args, named):
            return func(*args, **named)
        return _cast(func(*_cast(args, torch.float64), **_cast(named, torch.float64)), torch.float32)


def _single(args: Any, named: Mapping[str, Any]) -> bool:
    given = [value for value in (*args, *named.values()) if isinstance(value, Tensor) and value.is_floating_point()]
    return bool(given) and all(value.dtype == torch.float32 for value in given)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: _cast(each, dtype) for name, each in value.items()}
    return tuple(_cast(each, dtype) for each in value) if isinstance(value, tuple) else value
