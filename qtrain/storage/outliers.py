"""A stored tensor with a few outliers, which are kept in 16 bits each together with their positions."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from qtrain.storage.base import FloatPart, IntegerPart, Part, QTensor
from qtrain.storage.bits import Bits, BitStream


@final
@dataclass(frozen=True)
class Decoder(Part):
    """All parts of ``tensor`` except its codes."""

    tensor: QTensor

    def _parts(self) -> dict[str, Part | QTensor]:
        return {name: part for name, part in self.tensor.parts().items() if name != "codes"}

    @property
    def nbits(self) -> int:
        return sum(part.nbits for part in self._parts().values())

    def write(self) -> Bits:
        return torch.cat([torch.zeros(0, dtype=torch.uint8), *(part.write() for part in self._parts().values())])

    def read(self, stream: BitStream) -> tuple[Any, BitStream]:
        found: dict[str, Any] = {}
        for name, part in self._parts().items():
            found[name], stream = part.read(stream)
        return replace(self.tensor, **found), stream


@final
@dataclass(frozen=True, kw_only=True)
class OutlierTensor(QTensor):
    """``outliers`` (k,) float16 or bfloat16 at ``positions`` (k,), elsewhere the values that ``decoder`` gives
    ``codes``.

    ``decoder`` is a tensor of any kind without codes of its own (they are empty). ``positions`` count through the
    tensor in row-major order, ascending, in ``position_bits`` bits each. As a factor of a product an outlier has 16
    bits. Outliers are so few that ``operand_bits`` is that of the other values.
    """

    coded: ClassVar[tuple[str, ...]] = ("codes", "positions", "outliers")

    decoder: QTensor
    positions: Tensor
    position_bits: int
    outliers: Tensor

    def _rest(self) -> QTensor:
        return replace(self.decoder, codes=self.codes)

    def dequantize(self) -> Tensor:
        values = self._rest().dequantize()
        flat = values.reshape(-1).index_copy(0, self.positions.to(torch.int64), self.outliers.to(values.dtype))
        return flat.reshape(values.shape)

    def parts(self) -> Mapping[str, Part | QTensor]:
        return {
            "codes": self._rest().parts()["codes"],
            "decoder": Decoder(self.decoder),
            "positions": IntegerPart(self.positions, self.position_bits),
            "outliers": FloatPart(self.outliers),
        }

    @property
    def operand_bits(self) -> int:
        return self._rest().operand_bits
