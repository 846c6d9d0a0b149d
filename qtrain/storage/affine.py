"""Evenly spaced values: codes, a scale, and perhaps a zero point and an offset."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from qtrain.spec import Granularity, PerTensor
from qtrain.storage.base import FloatPart, IntegerPart, Part, QTensor, of_groups
from qtrain.storage.huffman import HuffmanPart


@final
@dataclass(frozen=True, kw_only=True)
class AffineTensor(QTensor):
    """``value = (code - zero_point) * scale + offset``.

    ``codes`` has the tensor's shape; ``scale``, ``zero_point`` (integers, in the code's range) and ``offset`` have the
    state shape of ``granularity`` and are stored in 32 bits, ``bits`` bits and 32 bits. The latter two may be ``None``.
    ``huffman`` stores the codes in a Huffman code of their own frequencies, whose table is counted with them.
    """

    scale: Tensor
    zero_point: Tensor | None = None
    offset: Tensor | None = None
    granularity: Granularity = PerTensor()  # noqa: RUF009 - frozen
    huffman: bool = False

    def dequantize(self) -> Tensor:
        shape = tuple(self.codes.shape)
        steps = self.codes
        if self.zero_point is not None:
            steps = steps - self._spread(self.zero_point, shape)
        values = steps.to(torch.float32) * self._spread(self.scale, shape)
        if self.offset is not None:
            values = values + self._spread(self.offset, shape)
        return values.to(self.dtype)

    def _spread(self, state: Tensor, shape: tuple[int, ...]) -> Tensor:
        return self.granularity.expand(of_groups(state, self.granularity, shape), shape)

    def parts(self) -> Mapping[str, Part]:
        kind = HuffmanPart if self.huffman else IntegerPart
        stored: dict[str, Part] = {"codes": kind(self.codes, self.bits, self.low), "scale": FloatPart(self.scale)}
        if self.zero_point is not None:
            stored["zero_point"] = IntegerPart(self.zero_point, self.bits, self.low)
        if self.offset is not None:
            stored["offset"] = FloatPart(self.offset)
        return stored

    @property
    def operand_bits(self) -> int:
        return self.bits
