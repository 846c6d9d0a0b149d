"""Pruning before quantizing: the smallest weights are zero for good, the others are quantized by any quantizer."""

from collections.abc import Mapping
from dataclasses import replace
from typing import final

import torch
from torch import Tensor

from qtrain.functional.affine import require_finite
from qtrain.functional.partition import largest_first
from qtrain.quantizers.base import MakeQuantizer
from qtrain.quantizers.hooks import project
from qtrain.quantizers.wrappers.wrapper import Wrapper
from qtrain.spec import Granularity, Observed, QuantSpec
from qtrain.storage.base import NumberPart, QTensor
from qtrain.storage.sparse import SparseTensor, gaps_of


def survivors_everywhere(x: Tensor, kept: Tensor, granularity: Granularity) -> Tensor:
    """``x`` with the values that are not ``kept`` replaced by kept ones of the same granularity group, in turns.

    A group without kept values is zero. Statistics of a group then see only kept values, each about equally often.
    """
    rows, keeps = granularity.flatten(x), granularity.flatten(kept)
    first = keeps.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    count = keeps.sum(dim=1, keepdim=True)
    turn = torch.cumsum(~keeps, dim=1).sub(1).clamp(min=0) % count.clamp(min=1)
    filled = torch.where(keeps, rows, rows.gather(1, first).gather(1, turn) * (count > 0))
    places = granularity.flatten(torch.arange(x.numel(), device=x.device).reshape(x.shape)).reshape(-1)
    return torch.empty_like(filled.reshape(-1)).scatter(0, places, filled.reshape(-1)).reshape(x.shape)


@final
class Pruned(Wrapper):
    """``Q(w)`` for the largest weights, 0 for the ``share`` with the smallest magnitudes (arXiv 1510.00149, §2).

    Han, Mao, Dally 2016, Deep Compression: pruning, then weight sharing (``kmeans`` inside), then Huffman codes; here
    around any quantizer ``Q`` that has a code for each weight. Calibration chooses the weights, the same share of each
    layer, and ``Q`` is calibrated on those that are left. The choice stays: a pruned weight has no gradient, and what
    moves it, momentum or decay, is undone after each step, while the others learn.

    Stored are the codes of the weights that are left and the gaps between them, ``gap_bits`` each (the paper has 8 for
    convolutions and 5 for linear layers), with ``huffman`` both in Huffman codes: see :mod:`qtrain.storage.sparse`.
    """

    serves = frozenset({"weight"})

    kept: Tensor

    def __init__(
        self, *, spec: QuantSpec, quantizer: MakeQuantizer, share: float = 0.5, gap_bits: int = 4, huffman: bool = False
    ) -> None:
        if not 0 <= share < 1:
            raise ValueError(f"Pruned: share must be in [0, 1), got {share}; 0.6 leaves 40 % of the weights")
        if not 1 <= gap_bits <= 16:
            raise ValueError(f"Pruned: gap_bits must be 1..16, got {gap_bits}; 4 to 8 are usual")
        super().__init__(spec=spec, quantizer=quantizer)
        self.share, self.gap_bits, self.huffman = share, gap_bits, huffman
        self.register_buffer("kept", torch.ones(spec.shape, dtype=torch.bool))

    def fake_quantize(self, x: Tensor) -> Tensor:
        kept = torch.empty_like(x).copy_(self.kept)  # in the memory layout of x, which is lost otherwise
        result: Tensor = self.inner(x * kept) * kept
        return result

    def quantize(self, x: Tensor) -> QTensor:
        require_finite(x)
        rest = self.inner.quantize(x.masked_fill(~self.kept, 0.0))
        if rest.codes.shape != x.shape:
            raise ValueError(
                f"Pruned: {type(self.inner).__name__} has no code for each weight, so single ones cannot be left out; "
                "take affine, lsq or kmeans"
            )
        return SparseTensor(
            codes=rest.codes[self.kept],
            bits=rest.bits,
            low=rest.low,
            high=rest.high,
            dtype=x.dtype,
            decoder=replace(rest, codes=rest.codes.new_zeros(0)),
            shape=tuple(x.shape),
            gaps=gaps_of(self.kept, self.gap_bits),
            gap_bits=self.gap_bits,
            huffman=self.huffman,
        )

    @torch.no_grad()
    def calibrate_(self, observed: Observed) -> None:
        weight = observed.tensor
        assert weight is not None
        left = weight.numel() - round(self.share * weight.numel())
        self.kept.copy_(largest_first(weight.abs(), torch.zeros_like(self.kept), left))
        self.inner.calibrate_(self.of_survivors(observed, weight))
        self.quantize(weight)  # raises here, and not when a file is written
        self.follow_inner_()

    def of_survivors(self, observed: Observed, weight: Tensor) -> Observed:
        """``observed`` as if only the weights that are left existed; an observer that clipped keeps its range."""
        rest = survivors_everywhere(weight, self.kept, self.granularity)
        rows = self.granularity.flatten(rest.float())
        low, high = (end.reshape(observed.low.shape) for end in rows.aminmax(dim=1))
        kept = self.granularity.flatten(weight.float() * self.kept).abs().sum(dim=1)
        count = self.granularity.flatten(self.kept).sum(dim=1).clamp(min=1)
        return Observed(
            low=torch.maximum(observed.low, low),
            high=torch.minimum(observed.high, high),
            mean_abs=(kept / count).reshape(observed.mean_abs.shape),
            tensor=rest,
        )

    def project(self, weight: Tensor) -> Tensor:
        return project(self.inner, weight).masked_fill(~self.kept, 0.0)

    def stored_state(self) -> Mapping[str, NumberPart]:
        return self.inner.stored_state()
