"""Stored tensors: each consists of parts with a known number of bits, from which its values follow.

Cost and export see quantizers only through this interface. Each kind of storage defines its parts (``parts``) and the
values that they stand for (``dequantize``). Its size in bits and its bytes follow from the parts.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, final

import numpy as np
import torch
from torch import Tensor

from qtrain.spec import Granularity
from qtrain.spec.blocks import Blocks
from qtrain.storage.bits import (
    Bits,
    BitStream,
    bits_to_bytes,
    bytes_to_bits,
    float_bits,
    from_float_bits,
    from_integer_bits,
    integer_bits,
)


class Part(ABC):
    """Something that is stored: a tensor, in a known number of bits."""

    @property
    @abstractmethod
    def nbits(self) -> int:
        """Exact storage in bits."""

    @abstractmethod
    def write(self) -> Bits:
        """The stored bits, (nbits,)."""

    @abstractmethod
    def read(self, stream: BitStream) -> tuple[Tensor, BitStream]:
        """The tensor at the head of ``stream``, with this part's shape and type, and the rest of the stream."""


@final
@dataclass(frozen=True)
class IntegerPart(Part):
    """Whole numbers ``low <= values < low + 2^bits``, ``bits`` bits each; ``values`` of any integer type."""

    values: Tensor
    bits: int
    low: int = 0

    @property
    def nbits(self) -> int:
        return self.values.numel() * self.bits

    def write(self) -> Bits:
        return integer_bits(self.values, self.bits, self.low)

    def read(self, stream: BitStream) -> tuple[Tensor, BitStream]:
        values = from_integer_bits(stream[: self.nbits], self.bits, self.low, self.values.dtype)
        return values.reshape(self.values.shape), stream[self.nbits :]


@final
@dataclass(frozen=True)
class FloatPart(Part):
    """Floating-point numbers, as many bits each as their type has."""

    values: Tensor

    @property
    def nbits(self) -> int:
        return self.values.numel() * torch.finfo(self.values.dtype).bits

    def write(self) -> Bits:
        return float_bits(self.values)

    def read(self, stream: BitStream) -> tuple[Tensor, BitStream]:
        values = from_float_bits(stream[: self.nbits], self.values.dtype)
        return values.reshape(self.values.shape), stream[self.nbits :]


NumberPart = IntegerPart | FloatPart
"""A part of which each number takes the same bits."""

WIDEST = 32
"""Bits of the widest code."""


def of_groups(state: Tensor, groups: Granularity | Blocks, shape: tuple[int, ...]) -> Tensor:
    """``state`` itself, if it has one number for each of the ``groups`` of a tensor of ``shape``.

    Raises ``ValueError`` otherwise: the two would broadcast against each other to something larger than either.
    """
    expected = groups.state_shape(shape)
    if tuple(state.shape) != expected:
        raise ValueError(
            f"a tensor of shape {shape} needs a state of shape {expected} to decode it, not {tuple(state.shape)}"
        )
    return state


@dataclass(frozen=True, kw_only=True)
class QTensor(ABC):
    """A quantized tensor: integer codes and what decodes them. Subclasses are final.

    ``codes`` are integers in ``low..high``, ``bits`` bits each; ``dtype`` is what :meth:`dequantize` gives, computed in
    float32. What a checkpoint's header holds (shapes, types, bit widths) is not counted as storage.
    """

    coded: ClassVar[tuple[str, ...]] = ("codes",)
    """Parts that belong to this tensor alone; the other parts decode it, and several tensors may share them."""

    codes: Tensor
    bits: int
    low: int
    high: int
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if not (isinstance(self.codes, Tensor) and type(self.bits) is int and 1 <= self.bits <= WIDEST):
            raise ValueError(f"{type(self).__name__}: needs codes of 1 to {WIDEST} bits, got {self.bits!r}")

    @abstractmethod
    def dequantize(self) -> Tensor:
        """The values that the codes stand for, in ``dtype``."""

    @abstractmethod
    def parts(self) -> Mapping[str, "Part | QTensor"]:
        """All that is stored, by the name of the field that holds it; the codes under ``codes``."""

    @property
    @abstractmethod
    def operand_bits(self) -> int:
        """Bits of one value as a factor of a product; 32 where a code is looked up in a table of floats."""

    @final
    @property
    def nbits(self) -> int:
        """Exact storage in bits, everything that decodes the codes included."""
        return sum(part.nbits for part in self.parts().values())

    @final
    @property
    def code_bits(self) -> int:
        """Exact storage of the codes alone, without what decodes them, in bits."""
        parts = self.parts()
        return sum(parts[name].nbits for name in self.coded)

    @final
    def write(self) -> Bits:
        """All parts, one after the other, (nbits,)."""
        return torch.cat([part.write() for part in self.parts().values()])

    @final
    def read(self, stream: BitStream) -> tuple[Self, BitStream]:
        """A tensor of the same kind, shapes and widths from the head of ``stream``, and the rest of the stream."""
        found: dict[str, Any] = {}
        for name, part in self.parts().items():
            found[name], stream = part.read(stream)
        return dataclasses.replace(self, **found), stream


def pack(tensor: QTensor) -> bytes:
    """``tensor`` as ``ceil(nbits / 8)`` bytes, without its header."""
    return bits_to_bytes(tensor.write())


def unpack(data: bytes | np.ndarray, like: QTensor) -> QTensor:
    """The tensor that :func:`pack` wrote, like ``like`` in kind and shapes; bytes may be (n,) uint8.

    Raises ``ValueError`` for other lengths.
    """
    stream = bytes_to_bits(data)
    try:
        value, rest = like.read(stream)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"unpack: {len(data)} bytes are too few for this tensor; is the file cut off?") from error
    if rest.numel() >= 8 or rest.numpy().any():
        raise ValueError(
            f"unpack: {rest.numel()} of {8 * len(data)} bits are left over; the shapes are another tensor's"
        )
    return value
