"""Sums of binary tensors: one bit a weight and plane, one factor a plane."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from qtrain.spec import Granularity, PerTensor
from qtrain.storage.base import FloatPart, IntegerPart, Part, QTensor, of_groups


def signed_sum(signs: Tensor | Sequence[Tensor], scale: Tensor | None, granularity: Granularity) -> Tensor:
    """``sum_m signs[m] * scale[m]``, float32: M tensors of -1 and 1, or of 0 and 1; ``scale`` (M, *state), or ``None``
    for ones.

    The planes are added one after the other, from first to last, so that every caller gets the same bits.
    """

    def plane(m: int) -> Tensor:
        values = signs[m].to(torch.float32)
        return values if scale is None else values * granularity.expand(scale[m], tuple(values.shape))

    total = plane(0)
    for m in range(1, len(signs)):
        total = total + plane(m)
    return total


@final
@dataclass(frozen=True, kw_only=True)
class BitPlanes(QTensor):
    """``value = sum_m (2 codes[m] - 1) * scale[m]``: ``codes`` (M, ...) of 0 and 1, ``bits`` planes.

    ``scale`` (M, *state) is stored in 32 bits each; ``None`` stands for ones, which need no storage. Binary weights
    have one plane, ABC-Net's and LQ-Nets' several. Of an ``unsigned`` tensor ``value = sum_m codes[m] * scale[m]``.
    """

    scale: Tensor | None = None
    granularity: Granularity = PerTensor()  # noqa: RUF009 - frozen
    unsigned: bool = False

    def dequantize(self) -> Tensor:
        digits = self.codes if self.unsigned else 2 * self.codes - 1
        for scale in () if self.scale is None else self.scale:
            of_groups(scale, self.granularity, tuple(self.codes.shape[1:]))
        return signed_sum(digits, self.scale, self.granularity).to(self.dtype)

    def parts(self) -> Mapping[str, Part]:
        stored: dict[str, Part] = {"codes": IntegerPart(self.codes, 1)}
        if self.scale is not None:
            stored["scale"] = FloatPart(self.scale)
        return stored

    @property
    def operand_bits(self) -> int:
        return self.bits
