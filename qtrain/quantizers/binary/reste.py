"""ReSTE: a sign whose gradient is that of a root, of an order that rises while training goes on."""

import math
from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from qtrain.functional.binary import mean_magnitude
from qtrain.functional.indicator import sign
from qtrain.functional.ste import straight_through
from qtrain.quantizers.base import float_parts
from qtrain.quantizers.binary.binary import Binary
from qtrain.spec import Granularity, Observed, PerChannel, PerTensor, QuantSpec
from qtrain.storage.base import NumberPart
from qtrain.storage.planes import signed_sum


def truncated_root(x: Tensor, order: Tensor, near: float, reach: float) -> Tensor:
    """``sign(x) |x|^(1/o)``, linear from -``near`` to ``near``, constant beyond ``reach``; float32, continuous.

    ``order`` o is 0-dim. The derivative is ``|x|^(1/o - 1) / o`` between ``near`` and ``reach``, the slope of the chord
    ``near^(1/o) / near`` within ``near``, where it would grow without bound, and 0 beyond ``reach``.
    """
    magnitude = x.float().abs()
    chord = x.float() * near ** (1 / order - 1)
    return torch.where(magnitude <= near, chord, sign(x) * magnitude.clamp(near, reach) ** (1 / order))


@final
class ReSTE(Binary):
    """``sign(x)`` with the gradient of :func:`truncated_root` (Wu et al. 2023, arXiv 2308.06689, eq. 8-12).

    The order ``o`` rises from 1, where the gradient is that of the clipped identity, to ``o_end``, nearer the sign's:
    ``o = 1 + (o_end - 1) (1 - cos(pi progress / 2))``, the authors' curve, slow at first. ``near`` and ``reach`` are
    the paper's thresholds ``m`` and ``t``, which keep the gradient stable.

    Weights are multiplied by the mean magnitude of their filter, ``alpha = mean |w|``, through which no gradient flows;
    inputs have no factor. ``center``: see :class:`Binary`.
    """

    order: Tensor

    def __init__(
        self, *, spec: QuantSpec, o_end: float = 3.0, near: float = 0.1, reach: float = 1.5, center: bool = True
    ) -> None:
        if not 1 <= o_end < math.inf:
            raise ValueError(f"ReSTE: o_end must be at least 1, got {o_end}; 3 is the paper's, 1 the clipped identity")
        if not 0 < near < reach < math.inf:
            raise ValueError(
                f"ReSTE: 0 < near < reach must hold, got near={near}, reach={reach}; the paper's are 0.1 and 1.5"
            )
        granularity: Granularity = PerChannel(0) if spec.is_weight else PerTensor()
        super().__init__(spec=spec, granularity=granularity, center=center)
        self.o_end, self.near, self.reach = o_end, near, reach
        self.register_buffer("order", torch.ones(()))

    def begin_step_(self, *, progress: float, key: int) -> None:
        self.order.fill_(1 + (self.o_end - 1) * (1 - math.cos(math.pi / 2 * progress)))

    def fake_quantize(self, x: Tensor) -> Tensor:
        real = self.centered(x)
        signs = straight_through(sign(real), truncated_root(real, self.order, self.near, self.reach))
        alpha = self.factor(x)
        if alpha is None:
            return signs.to(x.dtype)
        return signed_sum([signs], alpha.unsqueeze(0), self.granularity).to(x.dtype)

    def factor(self, x: Tensor) -> Tensor | None:
        return mean_magnitude(x.detach(), self.granularity) if self.spec.is_weight else None

    def calibrate_(self, observed: Observed) -> None:
        self.center_(observed)
        self.initialized.fill_(True)

    def stored_state(self) -> Mapping[str, NumberPart]:
        return float_parts(threshold=self.threshold if self.center else None)
