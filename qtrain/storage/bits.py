"""Numbers as bits, and bits as bytes: most significant first, without gaps."""

from typing import final

import numpy as np
import torch
from torch import Tensor

Bits = Tensor
"""Zeros and ones, (n,) uint8, on the CPU."""


@final
class PackedBits:
    """Bits that are still bytes: a part of them takes memory only where it is looked at.

    ``data`` are the bytes, (n,) uint8, of which the bits ``start`` to ``stop`` count. A slice is of the same kind.
    """

    def __init__(self, data: np.ndarray, start: int, stop: int) -> None:
        self._data, self._start, self._stop = data, start, stop

    def numel(self) -> int:
        return self._stop - self._start

    def __getitem__(self, part: slice) -> "PackedBits":
        first, last, _ = part.indices(self.numel())
        return PackedBits(self._data, self._start + first, self._start + max(first, last))

    def numpy(self) -> np.ndarray:
        """Zeros and ones, (numel,) uint8."""
        first = self._start // 8
        spread = np.unpackbits(self._data[first : -(-self._stop // 8)])
        return spread[self._start - 8 * first : self._stop - 8 * first]


BitStream = Bits | PackedBits
"""What is read from."""

_PATTERN = {
    torch.float64: torch.int64, torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16,
}  # fmt: skip
_CHUNK = 1 << 18
"""Numbers that are spread into bits or joined at a time, so that a large tensor takes no large intermediate ones."""


def bits_to_bytes(bits: Bits) -> bytes:
    """``bits`` as bytes; the last byte is filled up with zeros."""
    return np.packbits(bits.numpy()).tobytes()


def bytes_to_bits(data: bytes | np.ndarray) -> PackedBits:
    """All bits of ``data``, bytes or (n,) uint8: (8 n,)."""
    octets = np.frombuffer(data, dtype=np.uint8)
    return PackedBits(octets, 0, 8 * octets.size)


def integer_bits(values: Tensor, bits: int, low: int = 0) -> Bits:
    """``values - low`` in ``bits`` bits each. Raises ``ValueError`` for values outside ``low .. low + 2^bits - 1``."""
    shifted = values.detach().cpu().reshape(-1).to(torch.int64) - low
    if shifted.numel() and not (int(shifted.min()) >= 0 and int(shifted.max()) < 1 << bits):
        raise ValueError(f"integer_bits: values must lie in {low}..{low + (1 << bits) - 1} to fit {bits} bits")
    return _spread(shifted.numpy(), bits)


def from_integer_bits(stream: BitStream, bits: int, low: int = 0, dtype: torch.dtype = torch.int64) -> Tensor:
    """The (n,) numbers that :func:`integer_bits` wrote, with 64 bits the negative ones too.

    Raises ``ValueError`` where the bits are no multiple of ``bits``.
    """
    _container(bits)
    count, rest = divmod(stream.numel(), bits) if bits else (0, 0)
    if rest:
        raise ValueError(f"{stream.numel()} bits are no whole numbers of {bits} bits")
    numbers = torch.empty(count, dtype=dtype)
    for start in range(0, count, _CHUNK):
        chunk = stream[start * bits : (start + _CHUNK) * bits].numpy()
        numbers.numpy()[start : start + _CHUNK] = _joined(chunk, bits) + low
    return numbers


def float_bits(values: Tensor) -> Bits:
    """The bit patterns of ``values``, float64, float32, float16 or bfloat16."""
    pattern = values.detach().cpu().contiguous().reshape(-1).view(_PATTERN[values.dtype])
    return _spread(pattern.numpy(), torch.finfo(values.dtype).bits)


def from_float_bits(stream: BitStream, dtype: torch.dtype) -> Tensor:
    """The (n,) numbers of ``dtype`` that :func:`float_bits` wrote."""
    return from_integer_bits(stream, torch.finfo(dtype).bits, dtype=_PATTERN[dtype]).view(dtype)


def _spread(numbers: np.ndarray, bits: int) -> Bits:
    """The lowest ``bits`` bits of each of ``numbers`` (n,), negative ones in two's complement: (n bits,)."""
    width = _container(bits)
    spread = np.empty((numbers.size, bits), dtype=np.uint8)
    for start in range(0, numbers.size, _CHUNK):
        octets = numbers[start : start + _CHUNK].astype(f">u{width // 8}").view(np.uint8).reshape(-1, width // 8)
        spread[start : start + _CHUNK] = np.unpackbits(octets, axis=1)[:, width - bits :]
    return torch.from_numpy(spread.reshape(-1))


def _joined(spread: np.ndarray, bits: int) -> np.ndarray:
    """The numbers, (n,) int64, that :func:`_spread` was given."""
    width, rows = _container(bits), spread.reshape(-1, bits)
    if width > bits:
        padded = np.zeros((len(rows), width), dtype=np.uint8)
        padded[:, width - bits :] = rows
        rows = padded
    return np.packbits(rows, axis=1).view(f">u{width // 8}").reshape(-1).astype(np.int64)


def _container(bits: int) -> int:
    """The width of the smallest machine number of at least ``bits`` bits."""
    if not 0 <= bits <= 64:
        raise ValueError(f"a number of {bits} bits cannot be stored; 1 to 64 are possible")
    return next(width for width in (8, 16, 32, 64) if width >= bits)
