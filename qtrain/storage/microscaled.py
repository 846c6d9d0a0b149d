"""Small floating-point numbers under a power of two that each block shares (OCP MX)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from qtrain.spec.blocks import Blocks
from qtrain.storage.base import IntegerPart, Part, QTensor, of_groups
from qtrain.storage.elements import ELEMENTS


def power_codes(power: Tensor) -> Tensor:
    """The 8 exponent bits (127 added), int32, of float32 powers of two from 2^-126 on; this is their E8M0 code."""
    return power.view(torch.int32) >> 23


def powers(codes: Tensor) -> Tensor:
    """The powers of two, float32, that :func:`power_codes` had."""
    return (codes << 23).view(torch.float32)


@final
@dataclass(frozen=True, kw_only=True)
class MicroscaledTensor(QTensor):
    """``value = element(code) * 2^(exponent - 127)``: an ``exponent`` (8 bits, E8M0) for each of ``blocks``.

    ``codes`` (the tensor's shape) are bit patterns of ``element``, the name of one of
    :data:`~qtrain.storage.elements.ELEMENTS`. OCP MX 1.0, section 5.2.
    """

    exponent: Tensor
    element: str
    blocks: Blocks

    def dequantize(self) -> Tensor:
        shape = tuple(self.codes.shape)
        scale = self.blocks.spread(powers(of_groups(self.exponent, self.blocks, shape)), shape)
        return (ELEMENTS[self.element].decode(self.codes) * scale).to(self.dtype)

    def parts(self) -> Mapping[str, Part]:
        return {"codes": IntegerPart(self.codes, self.bits, self.low), "exponent": IntegerPart(self.exponent, 8)}

    @property
    def operand_bits(self) -> int:
        return self.bits
