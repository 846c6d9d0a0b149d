"""The k-th smallest magnitude of a large tensor; on a CPU several times as fast as ``torch.kthvalue``.

torch selects with one thread, value by value. numpy partitions with vector instructions. A compiled step calls it as
one operator, since the compiler knows no selection of its own.
"""

import torch
from torch import Tensor


def kth_magnitude(x: Tensor, k: int) -> Tensor:
    """The ``k``-th smallest of ``|x|``, ``k`` from 1, 0-dim float32; a NaN counts as the largest. Without gradient.

    ``x`` has any shape and memory layout. Raises ``ValueError`` where it has no ``k`` values.
    """
    if not 1 <= k <= x.numel():
        raise ValueError(f"kth_magnitude: k must be from 1 to the number of values, {x.numel()}, got {k}")
    result: Tensor = _kth_magnitude(x.detach(), k)
    return result


@torch.library.custom_op("qtrain::kth_magnitude", mutates_args=())
def _kth_magnitude(x: Tensor, k: int) -> Tensor:
    values = in_memory_order(x).abs().float()
    if values.device.type != "cpu":
        return values.kthvalue(k).values
    numbers = values.numpy()
    numbers.partition(k - 1)
    return torch.tensor(numbers[k - 1], dtype=torch.float32)


@_kth_magnitude.register_fake
def _(x: Tensor, k: int) -> Tensor:
    return x.new_empty((), dtype=torch.float32)


def in_memory_order(x: Tensor) -> Tensor:
    """The values of ``x``, (n,), as they lie in memory; a copy only where they do not lie densely."""
    order = sorted(range(x.ndim), key=lambda axis: x.stride(axis), reverse=True)
    return x.permute(order).reshape(-1)
