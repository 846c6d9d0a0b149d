"""A stored tensor most of whose values are zero: codes of the others, and how far each is from the one before."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor

from qtrain.storage.base import IntegerPart, Part, QTensor
from qtrain.storage.huffman import HuffmanPart
from qtrain.storage.outliers import Decoder


def gaps_of(kept: Tensor, bits: int) -> Tensor:
    """How many zeros stand before each of the places where ``kept`` (bool) is true, in row-major order; (m,) int32.

    A gap has ``bits`` bits. The highest number, ``2^bits - 1``, says that so many places are passed over and the gap
    goes on, so that a gap ``g`` is ``g // (2^bits - 1)`` of these and then the rest (relative indices of Deep
    Compression, arXiv 1510.00149, §2; there a place that is passed over is stored as a weight that is zero, which this
    saves). Zeros after the last place are not stored.

    >>> gaps_of(torch.tensor([1, 0, 0, 0, 0, 1, 1, 0], dtype=torch.bool), bits=2).tolist()
    [0, 3, 1, 0]
    """
    places = kept.reshape(-1).nonzero()[:, 0]
    gaps = places.diff(prepend=places.new_full((1,), -1)) - 1
    most = (1 << bits) - 1
    passed = gaps // most
    ends = (passed + 1).cumsum(dim=0) - 1
    found = gaps.new_full((int(ends[-1]) + 1 if len(ends) else 0,), most)
    found[ends] = gaps % most
    return found.to(torch.int32)


def places_of(gaps: Tensor, bits: int) -> Tensor:
    """The places, (k,) int64, ascending, that :func:`gaps_of` was given."""
    most = (1 << bits) - 1
    is_last = gaps < most
    steps = gaps.to(torch.int64) + is_last
    return steps.cumsum(dim=0)[is_last] - 1


@final
@dataclass(frozen=True, kw_only=True)
class SparseTensor(QTensor):
    """Zero except at the places that ``gaps`` lead to, where ``decoder`` gives the values of ``codes`` (k,).

    ``decoder`` is a tensor of any kind with a code for each value of ``shape``, without codes of its own (they are
    empty). ``gaps`` (m,) are those of :func:`gaps_of`, of ``gap_bits`` bits. ``huffman`` stores codes and gaps in
    Huffman codes of their own, whose tables are counted with them (§4).
    """

    coded: ClassVar[tuple[str, ...]] = ("codes", "gaps")

    decoder: QTensor
    shape: tuple[int, ...]
    gaps: Tensor
    gap_bits: int
    huffman: bool = False

    def dequantize(self) -> Tensor:
        count = torch.Size(self.shape).numel()
        places = places_of(self.gaps, self.gap_bits)
        filled = self.codes.new_full((count,), self.low).index_copy(0, places, self.codes)
        values = replace(self.decoder, codes=filled.reshape(self.shape)).dequantize()
        kept = torch.zeros(count, dtype=torch.bool, device=places.device).index_fill(0, places, True)
        return torch.where(kept.reshape(self.shape), values, 0.0)

    def parts(self) -> Mapping[str, Part | QTensor]:
        codes = replace(self.decoder, codes=self.codes).parts()["codes"]
        gaps: Part = IntegerPart(self.gaps, self.gap_bits)
        if self.huffman:
            gaps = HuffmanPart(self.gaps, self.gap_bits)
            if isinstance(codes, IntegerPart):
                codes = HuffmanPart(codes.values, codes.bits, codes.low)
        return {"codes": codes, "gaps": gaps, "decoder": Decoder(self.decoder)}

    @property
    def operand_bits(self) -> int:
        return replace(self.decoder, codes=self.codes).operand_bits
