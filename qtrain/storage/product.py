"""Vectors looked up in a table: an index for each block of neighboring values of an output channel."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from qtrain.storage.base import FloatPart, IntegerPart, Part, QTensor


def join_blocks(codes: Tensor, codebook: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The tensor of ``shape`` whose blocks are ``codebook[code]``: ``codes`` (O, R / d) int64, ``codebook`` (K, d)."""
    return codebook[codes].reshape(shape)


@final
@dataclass(frozen=True, kw_only=True)
class ProductTensor(QTensor):
    """``value[o] = codebook[codes[o, 0]], codebook[codes[o, 1]], ...`` along the flattened axes after the first.

    ``codes`` (O, R / d) for a tensor of ``shape`` (O, ...) with R values an output channel; ``codebook`` (K, d) float32
    is stored. ``bits`` are those of an index: a value takes ``bits / d``, and its share of the codebook.
    """

    codebook: Tensor
    shape: tuple[int, ...]

    def dequantize(self) -> Tensor:
        return join_blocks(self.codes.to(torch.int64), self.codebook, self.shape).to(self.dtype)

    def parts(self) -> Mapping[str, Part]:
        return {"codes": IntegerPart(self.codes, self.bits, self.low), "codebook": FloatPart(self.codebook)}

    @property
    def operand_bits(self) -> int:
        return 32
