"""Whole numbers under a power of two of each block, halved or not for each pair (shared microexponents)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from torch import Tensor

from qtrain.spec.blocks import Blocks
from qtrain.storage.base import IntegerPart, Part, QTensor, of_groups
from qtrain.storage.microscaled import powers


@final
@dataclass(frozen=True, kw_only=True)
class MicroexponentTensor(QTensor):
    """``value = code * 2^(exponent - 127) * 2^-shift * 2^(1 - m)``, with ``m`` mantissa bits in ``|code| < 2^m``.

    ``exponent`` (8 bits) for each of ``blocks``, ``shift`` (1 bit) for each of ``pairs``. ``bits`` is the format's
    nominal size, ``m + 2``, to which a full block comes on average: ``m + 1`` of a code, 8/16 and 1/2. It is also the
    width of a code with its shift carried out, as a factor of a product.
    """

    exponent: Tensor
    shift: Tensor
    blocks: Blocks
    pairs: Blocks

    def dequantize(self) -> Tensor:
        shape = tuple(self.codes.shape)
        shift = of_groups(self.shift, self.pairs, shape)
        power = powers(of_groups(self.exponent, self.blocks, shape))
        step = self.pairs.spread(1 - 0.5 * shift, shape) * self.blocks.spread(power, shape)
        return (self.codes * (step * (2.0 / (self.high + 1)))).to(self.dtype)

    def parts(self) -> Mapping[str, Part]:
        return {
            "codes": IntegerPart(self.codes, self.bits - 1, self.low),
            "exponent": IntegerPart(self.exponent, 8),
            "shift": IntegerPart(self.shift, 1),
        }

    @property
    def operand_bits(self) -> int:
        return self.bits
