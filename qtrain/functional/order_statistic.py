"""The k-th smallest magnitude of a large tensor; on a CPU many times as fast as ``torch.kthvalue``.

torch selects value by value, and slowly where many values are equal, as behind a ReLU. Here a sample says between which
two values the wanted one almost surely lies; vector instructions count, and only the few between are selected among. A
compiled step calls it as one operator, since the compiler knows no selection of its own.
"""

import math

import numpy as np
import torch
from torch import Tensor

SMALL = 2**14
"""Values of which it takes longer to sample than to select."""

STRIDE = 61
"""Every so many values are the sample: a prime, so that channels, whose numbers are round, come in alike."""

DEVIATIONS = 5
"""Standard deviations of a place in the sample that are allowed for to each side."""


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
    bracketed = None if values.device.type != "cpu" or len(values) < SMALL else _bracketed(values, k)
    return values.kthvalue(k).values if bracketed is None else bracketed


@_kth_magnitude.register_fake
def _(x: Tensor, k: int) -> Tensor:
    return x.new_empty((), dtype=torch.float32)


def _bracketed(values: Tensor, k: int) -> Tensor | None:
    """The ``k``-th smallest of ``values`` (n,), or ``None`` where the sample was misleading or a value is NaN."""
    if values.amax().isnan():
        return None
    numbers = values.numpy()
    sample = np.sort(numbers[::STRIDE])
    share = k / len(numbers)
    place, spread = share * len(sample), DEVIATIONS * math.sqrt(len(sample) * share * (1 - share)) + 1
    low = sample[int(place - spread)] if place >= spread else np.float32(-1)
    high = sample[int(place + spread)] if place + spread < len(sample) else np.float32(np.inf)
    inside = numbers > low
    up_to_low = len(numbers) - np.count_nonzero(inside)
    if k <= up_to_low:
        return torch.tensor(low) if k > np.count_nonzero(numbers < low) else None
    inside &= numbers < high
    between = numbers[inside]
    if (rank := k - up_to_low) <= len(between):
        between.partition(rank - 1)
        return torch.tensor(between[rank - 1])
    reached = low < high and rank <= len(between) + np.count_nonzero(numbers == high)
    return torch.tensor(high) if reached else None


def in_memory_order(x: Tensor) -> Tensor:
    """The values of ``x``, (n,), as they lie in memory; a copy only where they do not lie densely."""
    order = sorted(range(x.ndim), key=lambda axis: x.stride(axis), reverse=True)
    return x.permute(order).reshape(-1)
