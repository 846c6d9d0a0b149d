"""Whole numbers under a scale of each short vector, itself a whole number under a coarser scale (VS-Quant)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from qtrain.spec.blocks import Blocks
from qtrain.storage.base import FloatPart, IntegerPart, Part, QTensor, of_groups


@final
@dataclass(frozen=True, kw_only=True)
class VectorScaledTensor(QTensor):
    """``value = code * (fine * coarse)``: ``fine`` (``fine_bits`` bits, unsigned) for each of ``blocks``.

    ``coarse`` (float32) broadcasts against ``fine``: one number for each output channel, or one for all.
    """

    fine: Tensor
    fine_bits: int
    coarse: Tensor
    blocks: Blocks

    def dequantize(self) -> Tensor:
        shape = tuple(self.codes.shape)
        fine = of_groups(self.fine, self.blocks, shape)
        scale = self.blocks.spread(fine * self.coarse.expand(fine.shape), shape)
        return (self.codes.to(torch.float32) * scale).to(self.dtype)

    def parts(self) -> Mapping[str, Part]:
        return {
            "codes": IntegerPart(self.codes, self.bits, self.low),
            "fine": IntegerPart(self.fine, self.fine_bits),
            "coarse": FloatPart(self.coarse),
        }

    @property
    def operand_bits(self) -> int:
        return self.bits
