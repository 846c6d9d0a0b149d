"""Shared microexponents (MX4, MX6, MX9): block floating point whose pairs may move down by one bit."""

from collections.abc import Mapping
from typing import ClassVar, final

import torch
from torch import Tensor

from qtrain.functional.affine import require_finite
from qtrain.functional.clamping import clamp_
from qtrain.functional.indicator import above
from qtrain.functional.materialized import materialized
from qtrain.functional.powers import power_below
from qtrain.functional.ste import straight_through
from qtrain.quantizers.base import Quantizer
from qtrain.spec import Observed, PerTensor, QuantSpec
from qtrain.spec.blocks import Blocks
from qtrain.storage.base import NumberPart, QTensor
from qtrain.storage.microexponents import MicroexponentTensor
from qtrain.storage.microscaled import power_codes

LEAST_POWER = 2.0**-118
"""Smallest power of two that a block shares: its steps, up to 7 bits below and one more, are normal in float32."""


def mantissa_range(bits: int, signed: bool) -> tuple[int, int]:
    """Codes have a sign and ``bits - 2`` mantissa bits; exponents and shifts take the last bit of the nominal size."""
    return 1 - 2 ** (bits - 2), 2 ** (bits - 2) - 1


@final
class MX(Quantizer):
    """``x^ = round(x / s) s``, ``s = 2^(E - shift + 1 - m)``; ``E`` for 16 neighbors, ``shift`` (0, 1) for 2.

    Rouhani et al. 2023, "With Shared Microexponents, A Little Shifting Goes a Long Way", arXiv 2302.08007, §3.
    ``E = floor(log2 max|x|)`` over the block, in 8 bits; ``shift = 1`` where the pair's own exponent is lower. Of
    ``bits``, the nominal size, ``m = bits - 2`` are mantissa, 1 sign, and 8/16 + 1/2 the pair's part of exponent and
    shift: 4, 6, 9 are MX4 (m = 2), MX6 (4) and MX9 (7), the others formed alike. Ties go to even, and a code that
    rounding lifts to ``2^m`` becomes ``2^m - 1``. Blocks lie along the spec's channel axis, the last may be short;
    everything follows from the tensor at hand. The gradient passes everywhere.
    """

    widths: ClassVar[range] = range(3, 10)

    def __init__(self, *, spec: QuantSpec) -> None:
        super().__init__(spec=spec, granularity=PerTensor(), codes=mantissa_range)
        self.blocks = Blocks(size=16, axis=spec.channel_axis)
        self.pairs = Blocks(size=2, axis=spec.channel_axis)
        self.blocks_of_pairs = Blocks(size=8, axis=spec.channel_axis)

    def codes_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Codes and steps (shape of ``x``), each block's power of two and each pair's shift; all float32."""
        shape = tuple(x.shape)
        values = materialized(x.float())
        power = power_below(self.blocks.largest(values.abs())).clamp(min=LEAST_POWER)
        of_pairs = self.pairs.largest(values.abs())
        # 16 is a multiple of 2, so a pair has one block; its exponent is lower where its largest value is below 2^E.
        power_there = self.blocks_of_pairs.spread(power, tuple(of_pairs.shape))
        shift = above(power_there, of_pairs)
        steps = (1 - 0.5 * shift) * power_there * (2.0 / (self.code_high + 1))
        # Steps are powers of two, so a product with the reciprocal is the quotient, and there are few reciprocals.
        codes = (values * self.pairs.spread(1 / steps, shape)).round()
        return clamp_(codes, self.code_low, self.code_high), self.pairs.spread(steps, shape), power, shift

    def fake_quantize(self, x: Tensor) -> Tensor:
        codes, step, _, _ = self.codes_of(x)
        return straight_through((codes * step).to(x.dtype), x)

    def quantize(self, x: Tensor) -> QTensor:
        require_finite(x)
        codes, _, power, shift = self.codes_of(x)
        return MicroexponentTensor(
            codes=codes.to(torch.int32),
            bits=int(self.bits),
            low=int(self.code_low),
            high=int(self.code_high),
            dtype=x.dtype,
            exponent=power_codes(power),
            shift=shift.to(torch.int32),
            blocks=self.blocks,
            pairs=self.pairs,
        )

    @torch.no_grad()
    def calibrate_(self, observed: Observed) -> None:
        self.initialized.fill_(True)

    def stored_state(self) -> Mapping[str, NumberPart]:
        return {}
