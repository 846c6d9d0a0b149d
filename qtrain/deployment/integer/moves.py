"""Operators that move numbers and leave them as they are, and those on shapes."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qtrain.deployment.integer.fixed import Fixed, rescaled, uniform, unit
from qtrain.deployment.integer.values import Attributes, Operator, Value, fixed_point


def concatenate(inputs: Sequence[Any], attributes: Attributes) -> Value:
    axis = int(attributes["axis"])
    if all(isinstance(x, Tensor) for x in inputs):
        return torch.cat([x.reshape(-1) if x.ndim == 0 else x for x in inputs], dim=axis)
    parts = [uniform(fixed_point(x)) for x in inputs]
    if any(not torch.equal(part.scale, parts[0].scale) for part in parts):
        largest = max(parts, key=lambda part: part.bound * float(part.scale))
        scale = unit(largest)
        parts = [rescaled(part, scale) for part in parts]
    return Fixed(torch.cat([part.numbers for part in parts], dim=axis), parts[0].scale, max(p.bound for p in parts))


def moved(change: Callable[[Tensor, Sequence[Any], Attributes], Tensor]) -> Operator:
    """An operator that only moves numbers."""

    def operator(inputs: Sequence[Any], attributes: Attributes) -> Value:
        x = inputs[0]
        if isinstance(x, Tensor):
            return change(x, inputs, attributes)
        x = uniform(x)
        return Fixed(change(x.numbers, inputs, attributes), x.scale, x.bound)

    return operator


def reshape(x: Tensor, inputs: Sequence[Any], attributes: Attributes) -> Tensor:
    shape = [
        x.shape[i] if n == 0 and not attributes.get("allowzero", 0) else n for i, n in enumerate(inputs[1].tolist())
    ]
    return x.reshape(shape)


def flatten(x: Tensor, inputs: Sequence[Any], attributes: Attributes) -> Tensor:
    axis = int(attributes.get("axis", 1))
    return x.reshape(int(torch.tensor(x.shape[:axis]).prod()), -1)


def transpose(inputs: Sequence[Any], attributes: Attributes) -> Value:
    """The axes in another order; scales of channels go with them."""
    (x,) = inputs
    order = attributes.get("perm", range(len(x.shape) - 1, -1, -1))
    if isinstance(x, Tensor):
        return x.permute(*order)
    scale = x.scale.reshape(*(1 for _ in range(len(x.shape) - x.scale.ndim)), *x.scale.shape)
    return Fixed(x.numbers.permute(*order), scale.permute(*order), x.bound)


def squeeze(x: Tensor, inputs: Sequence[Any], attributes: Attributes) -> Tensor:
    axes = inputs[1].tolist() if len(inputs) > 1 else [i for i, n in enumerate(x.shape) if n == 1]
    return x.squeeze(tuple(axes) if isinstance(axes, list) else axes)


def unsqueeze(x: Tensor, inputs: Sequence[Any], attributes: Attributes) -> Tensor:
    for axis in sorted(inputs[1].reshape(-1).tolist()):
        x = x.unsqueeze(axis)
    return x


def slice_(x: Tensor, inputs: Sequence[Any], attributes: Attributes) -> Tensor:
    starts, ends = inputs[1].tolist(), inputs[2].tolist()
    axes = inputs[3].tolist() if len(inputs) > 3 else list(range(len(starts)))
    steps = inputs[4].tolist() if len(inputs) > 4 else [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        places = range(x.shape[axis])[start : end if abs(end) < 2**31 - 1 else None : step]
        x = x.index_select(axis, torch.tensor(places, dtype=torch.int64))
    return x


def pad(x: Tensor, inputs: Sequence[Any], attributes: Attributes) -> Tensor:
    mode = attributes.get("mode", "constant")
    amounts = inputs[1].tolist()
    before, after = amounts[: x.ndim], amounts[x.ndim :]
    if mode != "constant":
        return torch.from_numpy(np.pad(x.numpy(), list(zip(before, after, strict=True)), mode=mode))
    if len(inputs) > 2 and inputs[2] is not None and bool(inputs[2].any()):
        raise ValueError("a padding with another number than zero has no integer form here")
    return F.pad(x, [p for pair in zip(reversed(before), reversed(after), strict=True) for p in pair])


def depth_to_space(x: Tensor, inputs: Sequence[Any], attributes: Attributes) -> Tensor:
    """Channels become blocks of pixels; mode ``DCR`` has the block's place before the channel, ``CRD`` behind it."""
    side = int(attributes["blocksize"])
    length, channels, height, width = x.shape
    if attributes.get("mode", "DCR") == "DCR":
        x = x.reshape(length, side, side, channels // side**2, height, width).permute(0, 3, 4, 1, 5, 2)
    else:
        x = x.reshape(length, channels // side**2, side, side, height, width).permute(0, 1, 4, 2, 5, 3)
    return x.reshape(length, channels // side**2, height * side, width * side)


def split(inputs: Sequence[Any], attributes: Attributes) -> tuple[Value, ...]:
    x, sizes = inputs[0], inputs[1] if len(inputs) > 1 else None
    axis = int(attributes.get("axis", 0))
    number = -(-x.shape[axis] // int(attributes["num_outputs"])) if sizes is None else sizes.tolist()
    if isinstance(x, Tensor):
        return tuple(x.split(number, dim=axis))
    x = uniform(x)
    return tuple(Fixed(part, x.scale, x.bound) for part in x.numbers.split(number, dim=axis))


def gather(x: Tensor, inputs: Sequence[Any], attributes: Attributes) -> Tensor:
    index, axis = inputs[1], int(attributes.get("axis", 0)) % x.ndim
    chosen = x.index_select(axis, index.reshape(-1) % x.shape[axis])
    return chosen.reshape(*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])


def expand(x: Tensor, inputs: Sequence[Any], attributes: Attributes) -> Tensor:
    return x.expand(torch.broadcast_shapes(x.shape, tuple(inputs[1].tolist())))


def shape(inputs: Sequence[Any], attributes: Attributes) -> Tensor:
    return torch.tensor(inputs[0].shape, dtype=torch.int64)[attributes.get("start", 0) : attributes.get("end")]


def identity(inputs: Sequence[Any], attributes: Attributes) -> Value:
    value: Value = inputs[0]
    return value
