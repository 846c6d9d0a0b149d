"""Numbers as bits, and bits as bytes: most significant first, without gaps."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

Bits = Tensor
"""Zeros and ones, (n,) uint8, on the CPU."""

_PATTERN = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


def bits_to_bytes(bits: Bits) -> bytes:
    """``bits`` as bytes; the last byte is filled up with zeros."""
    return np.packbits(bits.numpy()).tobytes()


def bytes_to_bits(data: bytes) -> Bits:
    """All bits of ``data``, (8 len(data),)."""
    return torch.from_numpy(np.unpackbits(np.frombuffer(data, dtype=np.uint8)))


def integer_bits(values: Tensor, bits: int, low: int = 0) -> Bits:
    """``values - low`` in ``bits`` bits each. Raises ``ValueError`` for values outside ``low .. low + 2^bits - 1``."""
    shifted = values.detach().cpu().reshape(-1).to(torch.int64) - low
    if shifted.numel() and not (int(shifted.min()) >= 0 and int(shifted.max()) < 1 << bits):
        raise ValueError(f"integer_bits: values must lie in {low}..{low + (1 << bits) - 1} to fit {bits} bits")
    places = torch.arange(bits - 1, -1, -1)
    return ((shifted.unsqueeze(1) >> places) & 1).to(torch.uint8).reshape(-1)


def from_integer_bits(stream: Bits, bits: int, low: int = 0) -> Tensor:
    """The (n,) int64 numbers that :func:`integer_bits` wrote."""
    digits = stream.reshape(-1, bits).to(torch.int64) if bits else stream.to(torch.int64)
    return (digits << torch.arange(bits - 1, -1, -1)).sum(dim=1) + low


def float_bits(values: Tensor) -> Bits:
    """The bit patterns of ``values``, float32, float16 or bfloat16."""
    width = torch.finfo(values.dtype).bits
    pattern = values.detach().cpu().contiguous().view(_PATTERN[values.dtype])
    return integer_bits(pattern, width, low=-(1 << (width - 1)))


def from_float_bits(stream: Bits, dtype: torch.dtype) -> Tensor:
    """The (n,) numbers of ``dtype`` that :func:`float_bits` wrote."""
    width = torch.finfo(dtype).bits
    return from_integer_bits(stream, width, low=-(1 << (width - 1))).to(_PATTERN[dtype]).view(dtype)
