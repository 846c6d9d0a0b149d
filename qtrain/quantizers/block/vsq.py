"""VS-Quant: a scale for every short vector, kept as a small whole number under a coarse scale."""

from collections.abc import Mapping
from typing import ClassVar, final

import torch
from torch import Tensor

from qtrain.functional.affine import require_finite
from qtrain.functional.clamping import clamp_
from qtrain.functional.ranks import largest_of_ranks
from qtrain.functional.ste import expressible, straight_through
from qtrain.quantizers.base import Quantizer, narrow_range
from qtrain.spec import Observed, PerTensor, QuantSpec
from qtrain.spec.blocks import Blocks
from qtrain.storage.base import NumberPart, QTensor
from qtrain.storage.vector_scaled import VectorScaledTensor

TINY = torch.finfo(torch.float32).tiny


@final
class VSQ(Quantizer):
    """``x^ = round(x / s) (round(s / gamma) gamma)``: ``s`` for each vector of ``size``, ``gamma`` above it.

    Dai et al. 2021, arXiv 2102.04503, §4.2, two-level. ``s = max|x| / Qp`` of a vector along the spec's channel axis
    (the last may be short) first gives the codes; then it is itself rounded to ``scale_bits`` bits, unsigned, in units
    of ``gamma = max s / (2^scale_bits - 1)``: the largest of each output channel for weights, of the whole batch for
    inputs. Both follow from the tensor at hand in each forward, so that there is no state; calibration decides only
    whether inputs are unsigned. A vector far smaller than the largest, ``s < gamma / 2``, becomes zero. Scales are
    constants for the gradient, which passes everywhere except to negative values of unsigned inputs.
    """

    widths: ClassVar[range] = range(2, 9)

    def __init__(self, *, spec: QuantSpec, size: int = 16, scale_bits: int = 4) -> None:
        if not 1 <= scale_bits <= 16:
            raise ValueError(f"VSQ: scale_bits must be in 1..16, got {scale_bits}")
        if size < 1:
            raise ValueError(f"VSQ: size must be at least 1 element of a vector, got {size}")
        super().__init__(spec=spec, granularity=PerTensor(), codes=narrow_range)
        self.scale_bits = scale_bits
        self.blocks = Blocks(size=size, axis=spec.channel_axis)
        # A weight without inputs (a vector) has no vector of its own for each output: one coarse scale for all.
        self.coarse_shape = (spec.shape[0], *(1 for _ in spec.shape[1:])) if len(spec.shape) > 1 else ()

    def codes_of(self, x: Tensor, *, of_all_ranks: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Codes (shape of ``x``), fine scales (a whole number for each vector) and coarse scales; all float32."""
        values = x.detach().float()
        # Values that no unsigned code represents do not affect the scale.
        sizes = torch.where(self.code_low < 0, values.abs(), values.clamp(min=0))
        exact = self.blocks.largest(sizes) / self.code_high
        # A vector of zeros is divided by 1 and does not affect the coarse scale.
        used = exact * (exact > TINY)
        codes = values / self.blocks.spread(torch.where(used > 0, used, 1.0), tuple(x.shape))
        top = 2**self.scale_bits - 1
        coarse = self.coarsest(used)
        if of_all_ranks and not self.spec.is_weight:
            coarse = largest_of_ranks(coarse)
        coarse = coarse / top
        coarse = torch.where(coarse > TINY, coarse, 1.0)
        return clamp_(codes.round(), self.code_low, self.code_high), (used / coarse).round().clamp(0, top), coarse

    def coarsest(self, scales: Tensor) -> Tensor:
        """The largest of the vectors' scales: of each output channel of a weight, of all for an input."""
        if scales.numel() == 0:
            return scales.new_zeros(self.coarse_shape)
        return scales.amax(dim=tuple(range(1, scales.ndim)), keepdim=True) if self.coarse_shape else scales.amax()

    def fake_quantize(self, x: Tensor) -> Tensor:
        codes, fine, coarse = self.codes_of(x, of_all_ranks=self.training)
        values = codes * self.blocks.spread(fine * coarse, tuple(x.shape))
        return straight_through(values.to(x.dtype), expressible(x, self.code_low))

    def quantize(self, x: Tensor) -> QTensor:
        require_finite(x)
        codes, fine, coarse = self.codes_of(x)
        return VectorScaledTensor(
            codes=codes.to(torch.int32),
            bits=int(self.bits),
            low=int(self.code_low),
            high=int(self.code_high),
            dtype=x.dtype,
            fine=fine.to(torch.int32),
            fine_bits=self.scale_bits,
            coarse=coarse,
            blocks=self.blocks,
        )

    @torch.no_grad()
    def calibrate_(self, observed: Observed) -> None:
        self.choose_sign_(observed)
        self.initialized.fill_(True)

    def stored_state(self) -> Mapping[str, NumberPart]:
        return {}
