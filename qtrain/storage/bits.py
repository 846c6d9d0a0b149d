"""Numbers as bits, and bits as bytes: most significant first, without gaps."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

Bits = Tensor
"""Zeros and ones, (n,) uint8, on the CPU."""

_PATTERN = {
    torch.float64: torch.int64, torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16,
}  # fmt: skip
_CHUNK = 1 << 18
"""Numbers that are spread into bits at a time, so that a large tensor takes no large intermediate ones."""


def bits_to_bytes(bits: Bits) -> bytes:
    """``bits`` as bytes; the last byte is filled up with zeros."""
    return np.packbits(bits.numpy()).tobytes()


def bytes_to_bits(data: bytes | np.ndarray) -> Bits:
    """All bits of ``data``, bytes or (n,) uint8: (8 n,)."""
    return torch.from_numpy(np.unpackbits(np.frombuffer(data, dtype=np.uint8)))


def integer_bits(values: Tensor, bits: int, low: int = 0) -> Bits:
    """``values - low`` in ``bits`` bits each. Raises ``ValueError`` for values outside ``low .. low + 2^bits - 1``."""
    shifted = values.detach().cpu().reshape(-1).to(torch.int64) - low
    if shifted.numel() and not (int(shifted.min()) >= 0 and int(shifted.max()) < 1 << bits):
        raise ValueError(f"integer_bits: values must lie in {low}..{low + (1 << bits) - 1} to fit {bits} bits")
    return _spread(shifted.numpy(), bits)


def from_integer_bits(stream: Bits, bits: int, low: int = 0) -> Tensor:
    """The (n,) int64 numbers that :func:`integer_bits` wrote."""
    return torch.from_numpy(_joined(stream.numpy(), bits)) + low


def float_bits(values: Tensor) -> Bits:
    """The bit patterns of ``values``, float64, float32, float16 or bfloat16."""
    pattern = values.detach().cpu().contiguous().reshape(-1).view(_PATTERN[values.dtype])
    return _spread(pattern.numpy(), torch.finfo(values.dtype).bits)


def from_float_bits(stream: Bits, dtype: torch.dtype) -> Tensor:
    """The (n,) numbers of ``dtype`` that :func:`float_bits` wrote."""
    numbers = torch.from_numpy(_joined(stream.numpy(), torch.finfo(dtype).bits))
    return numbers.to(_PATTERN[dtype]).view(dtype)


def _spread(numbers: np.ndarray, bits: int) -> Bits:
    """The lowest ``bits`` bits of each of ``numbers`` (n,), negative ones in two's complement: (n bits,)."""
    width = _container(bits)
    spread = np.empty((numbers.size, bits), dtype=np.uint8)
    for start in range(0, numbers.size, _CHUNK):
        octets = numbers[start : start + _CHUNK].astype(f">u{width // 8}").view(np.uint8).reshape(-1, width // 8)
        spread[start : start + _CHUNK] = np.unpackbits(octets, axis=1)[:, width - bits :]
    return torch.from_numpy(spread.reshape(-1))


def _joined(stream: np.ndarray, bits: int) -> np.ndarray:
    """The numbers, (n,) int64, that :func:`_spread` was given; with 64 bits the negative ones too."""
    width = _container(bits)
    rows = stream.reshape(-1, bits) if bits else stream.reshape(0, 0)
    numbers = np.empty(len(rows), dtype=np.int64)
    for start in range(0, len(rows), _CHUNK):
        padded = np.zeros((min(_CHUNK, len(rows) - start), width), dtype=np.uint8)
        padded[:, width - bits :] = rows[start : start + _CHUNK]
        numbers[start : start + _CHUNK] = np.packbits(padded, axis=1).view(f">u{width // 8}").reshape(-1)
    return numbers


def _container(bits: int) -> int:
    """The width of the smallest machine number of at least ``bits`` bits."""
    if not 0 <= bits <= 64:
        raise ValueError(f"a number of {bits} bits cannot be stored; 1 to 64 are possible")
    return next(width for width in (8, 16, 32, 64) if width >= bits)
