"""QIL: the interval of magnitudes that is quantized is trained; what lies below is pruned, what lies above clipped."""

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor, nn

from qtrain.functional.affine import require_finite
from qtrain.functional.learned_step import SMALLEST_SCALE
from qtrain.functional.ste import clamp_to, round_ste
from qtrain.quantizers.base import Quantizer, float_parts, narrow_range
from qtrain.spec import Observed, PerTensor, QuantSpec
from qtrain.storage.affine import AffineTensor
from qtrain.storage.base import NumberPart, QTensor

SMALLEST_MAGNITUDE = 2.0**-24
"""Transformed magnitudes up to this are zero: a power below 1 has no derivative there."""

SMALLEST_GAMMA = 2.0**-6


def transform(x: Tensor, center: Tensor, width: Tensor, gamma: Tensor | None) -> Tensor:
    """``sign(x) clip((|x| - c) / (2 d) + 1/2, 0, 1)^gamma``, float32 (eq. 3, 5); ``gamma=None`` is 1.

    Magnitudes below ``c - d`` become 0, those above ``c + d`` become 1; ``center`` c, ``width`` d and ``gamma`` are
    0-dim, and the gradient of all of them is exact.
    """
    magnitude = (x.float().abs() - center) / width * 0.5 + 0.5
    power = magnitude.clamp(SMALLEST_MAGNITUDE, 1)
    if gamma is not None:
        power = power**gamma
    return torch.where(magnitude > SMALLEST_MAGNITUDE, power, 0.0) * x.float().sign()


@final
class QIL(Quantizer):
    """``x^ = round(T(x) q) / q`` with :func:`transform` T (Jung et al. 2019, arXiv 1808.05779, eq. 1-5).

    ``q = 2^(b-1) - 1`` for weights and other signed values, ``2^b - 1`` for unsigned inputs. Center, width and, for
    weights, ``gamma`` are trained on the task's loss; rounding is straight-through. Quantized values lie in [-1, 1]
    whatever the tensor's own scale, which a batch norm behind the layer absorbs.

    The pruning threshold ``c - d`` is kept from falling below zero, so that zero stays zero. Calibration starts the
    interval at ``[0, reach]``, reach the largest magnitude of the observed range, with ``gamma = 1``: uniform
    quantization. ``learn_gamma=False`` leaves gamma at 1, as the paper does for inputs.
    """

    center: nn.Parameter
    width: nn.Parameter
    gamma: nn.Parameter | None

    def __init__(self, *, spec: QuantSpec, learn_gamma: bool = True) -> None:
        super().__init__(spec=spec, granularity=PerTensor(), codes=narrow_range)
        self.center = nn.Parameter(torch.full((), 0.5))
        self.width = nn.Parameter(torch.full((), 0.5))
        learned = spec.is_weight and learn_gamma
        self.register_parameter("gamma", nn.Parameter(torch.ones(())) if learned else None)

    def interval(self) -> tuple[Tensor, Tensor]:
        """Center and width in use, 0-dim: ``d > 0`` and ``c >= d``."""
        width = self.width.abs().clamp(min=SMALLEST_SCALE)
        return torch.where(self.center < width, width, self.center), width

    def steps(self, x: Tensor) -> Tensor:
        """``T(x) q``, before rounding, within the code range; float32, shape of ``x``."""
        gamma = None if self.gamma is None else self.gamma.clamp(min=SMALLEST_GAMMA)
        return clamp_to(transform(x, *self.interval(), gamma) * self.code_high, self.code_low, self.code_high)

    def fake_quantize(self, x: Tensor) -> Tensor:
        return (round_ste(self.steps(x)) * (1 / self.code_high)).to(x.dtype)

    @torch.no_grad()
    def quantize(self, x: Tensor) -> QTensor:
        require_finite(x)
        return AffineTensor(
            codes=self.steps(x).round().to(torch.int32),
            bits=int(self.bits),
            low=int(self.code_low),
            high=int(self.code_high),
            dtype=x.dtype,
            scale=1 / self.code_high,
        )

    @torch.no_grad()
    def calibrate_(self, observed: Observed) -> None:
        self.choose_sign_(observed)
        reach = torch.maximum(observed.low.abs(), observed.high.abs())
        half = torch.where(reach > SMALLEST_SCALE, reach, 1.0) / 2
        self.center.copy_(half)
        self.width.copy_(half)
        if self.gamma is not None:
            self.gamma.fill_(1.0)
        self.initialized.fill_(True)

    def stored_state(self) -> Mapping[str, NumberPart]:
        return float_parts(center=self.center, width=self.width)
