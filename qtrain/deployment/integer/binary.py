"""Products of two-valued numbers by XNOR and popcount on packed words (XNOR-Net, Rastegari et al. 2016, 1603.05279).

With signs of -1 and 1, a product is 1 where the signs are equal and -1 where they differ. So a sum of ``n`` products is
``n`` minus twice the number of ones in the XOR of the words that hold the signs, which is the plain integer sum.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_PAIRS, _FOURS, _BYTES, _ONES = (int.from_bytes(bytes([byte] * 8), "big") for byte in (0x55, 0x33, 0x0F, 0x01))


def magnitude(numbers: Tensor) -> int:
    """The one magnitude of all ``numbers``, int64; 0 where they have several or are zeros."""
    if numbers.numel() == 0:
        return 0
    least, largest = numbers.abs().aminmax()
    return int(largest) if least == largest else 0


def popcount(words: Tensor) -> Tensor:
    """The ones among the 64 bits of each of ``words``, int64, by adding neighbors, pairs, and so on."""
    pairs = words - ((words >> 1) & _PAIRS)
    fours = (pairs & _FOURS) + ((pairs >> 2) & _FOURS)
    return (((fours + (fours >> 4)) & _BYTES) * _ONES) >> 56


def packed(bits: Tensor) -> Tensor:
    """``bits`` (..., K) of 0 and 1 as words (..., ceil(K / 64)), int64, zeros in what is left over."""
    octets = np.packbits(F.pad(bits.to(torch.uint8), (0, -bits.shape[-1] % 64)).numpy(), axis=-1)
    return torch.from_numpy(np.ascontiguousarray(octets).view(np.int64))


def signed_products(rows: Tensor, weight: Tensor) -> Tensor:
    """``sign(rows) @ sign(weight).T``, (N, O): ``rows`` (N, K), of which zeros count for nothing, ``weight`` (O, K)."""
    signs, counted = packed(rows > 0), packed(rows != 0)
    length = popcount(counted).sum(dim=-1)
    made = [length - 2 * popcount((signs ^ word) & counted).sum(dim=-1) for word in packed(weight > 0)]
    return torch.stack(made, dim=-1)


def linear(numbers: Tensor, weight: Tensor) -> Tensor | None:
    """``numbers @ weight.T`` of (..., K) and (O, K), int64; ``None`` where one has more than two values, -a and a."""
    factor = magnitude(weight) and magnitude(weight) * magnitude(numbers)
    if not factor:
        return None
    sums = signed_products(numbers.flatten(0, -2), weight)
    return (factor * sums).reshape(*numbers.shape[:-1], -1)


def convolution(
    numbers: Tensor, weight: Tensor, strides: Sequence[int], pads: Sequence[int], dilations: Sequence[int], groups: int
) -> Tensor | None:
    """The convolution of (N, C, ...) with (O, C / groups, ...), int64; ``None`` as for :func:`linear`.

    ``pads`` are the zeros before each axis and after each.
    """
    factor = magnitude(weight) and magnitude(weight) * magnitude(numbers)
    if not factor:
        return None
    axes = weight.ndim - 2
    amounts = [p for pair in zip(reversed(pads[:axes]), reversed(pads[axes:]), strict=True) for p in pair]
    windows = [F.pad(numbers.sign().to(torch.int8), amounts)]
    for axis, (k, s, d) in enumerate(zip(weight.shape[2:], strides, dilations, strict=True), start=2):
        reach = windows[0].shape[axis] - d * (k - 1)
        windows = [some.narrow(axis, p * d, reach) for some in windows for p in range(k)]
        windows = [some.index_select(axis, torch.arange(0, reach, s)) for some in windows]
    rows = torch.stack(windows, dim=-1).movedim(1, -2)  # (N, ..., C, kernel positions)
    parts = zip(rows.chunk(groups, dim=-2), weight.chunk(groups), strict=True)
    sums = [signed_products(part.flatten(0, axes).flatten(1), some.flatten(1)) for part, some in parts]
    return (factor * torch.cat(sums, dim=-1)).reshape(*rows.shape[: axes + 1], -1).movedim(-1, 1)
