"""Levels that a method fixes, such as powers of two: an index for each element, a scale for each group."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from qtrain.spec import Granularity, PerTensor
from qtrain.storage.base import FloatPart, IntegerPart, Part, QTensor, of_groups


@final
@dataclass(frozen=True, kw_only=True)
class LevelTensor(QTensor):
    """``value = levels[code] * scale``: ``codes`` has the tensor's shape, ``scale`` the state shape of ``granularity``.

    ``levels`` (K,) float32 follow from the method and the bit width, as a code's meaning does, and are not stored.
    """

    levels: Tensor
    scale: Tensor
    granularity: Granularity = PerTensor()  # noqa: RUF009 - frozen

    def dequantize(self) -> Tensor:
        shape = tuple(self.codes.shape)
        scale = self.granularity.expand(of_groups(self.scale, self.granularity, shape), shape)
        return (self.levels[self.codes.to(torch.int64)] * scale).to(self.dtype)

    def parts(self) -> Mapping[str, Part]:
        return {"codes": IntegerPart(self.codes, self.bits, self.low), "scale": FloatPart(self.scale)}

    @property
    def operand_bits(self) -> int:
        return self.bits
