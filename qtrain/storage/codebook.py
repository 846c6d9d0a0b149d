"""Values looked up in a table: an index for each element, a codebook for each group that shares one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from qtrain.spec import Granularity, PerTensor
from qtrain.storage.base import FloatPart, IntegerPart, Part, QTensor, of_groups
from qtrain.storage.huffman import HuffmanPart


def look_up(codes: Tensor, codebook: Tensor, granularity: Granularity) -> Tensor:
    """``codebook[group, code]`` for every element: ``codes`` int64 of any shape, ``codebook`` (*state, K)."""
    if codebook.ndim == 1:
        return codebook[codes]
    rows = torch.arange(codebook.shape[:-1].numel(), device=codes.device).reshape(codebook.shape[:-1])
    first = granularity.expand(rows, tuple(codes.shape)) * codebook.shape[-1]
    return codebook.reshape(-1)[first + codes]


@final
@dataclass(frozen=True, kw_only=True)
class CodebookTensor(QTensor):
    """``value = codebook[code]``: ``codes`` has the tensor's shape, ``codebook`` (*state, K) float32 is stored.

    ``huffman`` stores the codes in a Huffman code of their own frequencies, whose table is counted with them.
    ``operand`` is the width of a value as a factor: 32, unless the products come down to sums over few sets.
    """

    codebook: Tensor
    granularity: Granularity = PerTensor()  # noqa: RUF009 - frozen
    huffman: bool = False
    operand: int = 32

    def dequantize(self) -> Tensor:
        of_groups(self.codebook[..., 0], self.granularity, tuple(self.codes.shape))
        return look_up(self.codes.to(torch.int64), self.codebook, self.granularity).to(self.dtype)

    def parts(self) -> Mapping[str, Part]:
        kind = HuffmanPart if self.huffman else IntegerPart
        return {"codes": kind(self.codes, self.bits, self.low), "codebook": FloatPart(self.codebook)}

    @property
    def operand_bits(self) -> int:
        return self.operand
