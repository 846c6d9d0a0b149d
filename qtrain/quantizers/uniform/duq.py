"""DuQ: one learned level clips, another scales the output; one formula for signed, unsigned and shifted values."""

from collections.abc import Mapping
from dataclasses import replace
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtrain.functional.learned_step import SMALLEST_SCALE
from qtrain.functional.ste import clamp_to, round_ste
from qtrain.quantizers.base import Quantizer, float_parts, narrow_range
from qtrain.spec import Granularity, Observed, PerTensor, QuantSpec
from qtrain.storage.base import NumberPart, QTensor


def softplus_inverse(value: Tensor) -> Tensor:
    """``log(e^v - 1)`` for ``v > 0``, exact for small and large ``v`` alike."""
    return value + torch.log(-torch.expm1(-value))


@final
class DuQ(Quantizer):
    """``x^ = round(clip((x - l) / a, -1 or 0, 1) q) c / q + l`` (Park and Yoo 2020, arXiv 2008.04693, §5).

    ``a = softplus(a')`` bounds the input and ``c = softplus(c')`` the output; a' and c' are learned. Their gradient is
    exact except for the rounding, which is straight-through. ``q = 2^(b-1) - 1`` for signed values, clipped at -1, and
    ``2^b - 1`` for unsigned ones, clipped at 0.

    ``lower`` is l, the lowest value of the activation function before an input: 0, or -0.375 after h-swish. Inputs in
    which calibration saw nothing below it are unsigned and shifted by it (so that zero is not one of their values, and
    the paper pads with l); others, and weights, are signed and not shifted. Both levels start at the end of the
    observed range; the authors' code starts at 0.9 max|w| of weights and at the 95th percentile of activations.
    """

    clip_level: nn.Parameter
    output_level: nn.Parameter
    offset: Tensor | None

    def __init__(
        self,
        *,
        spec: QuantSpec,
        granularity: Granularity = PerTensor(),  # noqa: B008 - frozen
        lower: float = 0.0,
    ) -> None:
        if not lower <= 0:
            raise ValueError(
                f"DuQ: lower must be 0 or below, got {lower}; it is the activation function's lowest value"
            )
        super().__init__(spec=spec, granularity=granularity, codes=narrow_range)
        self.lower = lower
        shifted = lower < 0 and not spec.is_weight
        vars(self).update(keeps_zero=not shifted)
        self.clip_level = nn.Parameter(torch.zeros(self.state_shape))
        self.output_level = nn.Parameter(torch.zeros(self.state_shape))
        self.register_buffer("offset", torch.zeros(self.state_shape) if shifted else None)

    def scales(self) -> tuple[Tensor, Tensor]:
        """``a / q`` and ``c / q``: the steps of input and output, never zero; shape of the state."""
        clip, output = (F.softplus(p).clamp(min=SMALLEST_SCALE) for p in (self.clip_level, self.output_level))
        return clip / self.code_high, output / self.code_high

    def fake_quantize(self, x: Tensor) -> Tensor:
        clip, output = (self.spread(scale, x) for scale in self.scales())
        shifted = x.float() if self.offset is None else x.float() - self.spread(self.offset, x)
        values = round_ste(clamp_to(shifted / clip, self.code_low, self.code_high)) * output
        return (values if self.offset is None else values + self.spread(self.offset, x)).to(x.dtype)

    def quantize(self, x: Tensor) -> QTensor:
        clip, output = self.scales()
        return replace(self.affine_tensor(x, clip, offset=self.offset), scale=output.detach())

    @torch.no_grad()
    def calibrate_(self, observed: Observed) -> None:
        if self.offset is None:
            self.choose_sign_(observed)
            low, high = observed.low, observed.high
        else:
            signed = bool((observed.low < self.lower).any())
            self.set_range_(bits=int(self.bits), signed=signed)
            self.offset.fill_(0.0 if signed else self.lower)
            low, high = observed.low - self.offset, observed.high - self.offset
        reach = torch.maximum(low.abs(), high.abs()) if bool(self.signed) else high
        level = softplus_inverse(torch.where(reach > SMALLEST_SCALE, reach, 1.0))
        self.clip_level.copy_(level)
        self.output_level.copy_(level)
        self.initialized.fill_(True)

    @torch.no_grad()
    def rescale_(self, factor: Tensor) -> dict[nn.Parameter, Tensor]:
        changed = {}
        for parameter in (self.clip_level, self.output_level):
            slope = torch.sigmoid(parameter)
            parameter.copy_(softplus_inverse(F.softplus(parameter) * factor))
            # d softplus(p) / dp = sigmoid(p), so that the chain rule has the two slopes beside 1 / factor.
            changed[parameter] = torch.sigmoid(parameter) / (slope * factor)
        return changed

    def stored_state(self) -> Mapping[str, NumberPart]:
        return float_parts(clip=self.clip_level, output=self.output_level, offset=self.offset)
