"""IR-Net: signs of balanced weights times a power of two, and a gradient that turns from identity to sign."""

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

ROUNDING_SHARE = 2.0**-20
"""A filter whose spread is below this share of its mean magnitude counts as constant: that is float32's rounding."""

SMALLEST_SPREAD = 2.0**-60
"""A filter with a smaller spread also counts as constant, because the square would leave float32's range."""


def standardized(w: Tensor, granularity: Granularity) -> Tensor:
    """``(w - mean) / std`` of each group, float32, differentiable (eq. 5); 0 for a group whose values are all the same.

    ``std`` divides by ``n - 1``, as the authors' program does.
    """
    rows = granularity.flatten(w.float())
    shape, n = granularity.state_shape(tuple(w.shape)), rows.shape[1]
    mean = (rows.sum(dim=1) / max(n, 1)).reshape(shape)
    balanced = w.float() - granularity.expand(mean, tuple(w.shape))
    spread = (granularity.flatten(balanced).square().sum(dim=1) / max(n - 1, 1)).reshape(shape)
    with torch.no_grad():
        floor = (ROUNDING_SHARE * mean_magnitude(w, granularity)).clamp(min=SMALLEST_SPREAD).square()
        varies = spread > floor
    # The root of a constant group's spread would have an infinite gradient, though it is multiplied by 0.
    inverse = torch.where(varies, torch.where(varies, spread, 1.0).rsqrt(), 0.0)
    return balanced * granularity.expand(inverse, tuple(w.shape))


def shift_scale(w: Tensor, granularity: Granularity) -> Tensor:
    """``2^round(log2(mean |w|))`` of each group, of the state shape (eq. 6-7); 0 where the mean is."""
    mean = mean_magnitude(w, granularity)
    # exp2 of a whole number is inexact in some libraries; ldexp is not.
    powers = torch.ldexp(torch.ones_like(mean), torch.where(mean > 0, mean, 1.0).log2().round().to(torch.int32))
    return torch.where(mean > 0, powers, 0.0)


@final
class IRNet(Binary):
    """``2^s sign(w_std)`` for weights, ``sign(x)`` for inputs (Qin et al. 2020, arXiv 1909.10788).

    Libra-PB (eq. 5-7): each filter is balanced and standardized before the sign, so that both signs are about equally
    frequent, and scaled by a power of two, ``s = round(log2(mean |w_std|))``, which costs a shift. The gradient flows
    through balance and standardization, and not through ``s``. A filter whose weights are all the same becomes 0.

    EDE (eq. 9-11): the gradient of the sign is that of ``g(x) = k tanh(t x)``, with
    ``t = t_min 10^(progress log10(t_max / t_min))`` and ``k = max(1 / t, 1)``: near the identity at first, near the
    sign in the end. The slope at zero is ``k t``. ``center``: see :class:`Binary`.
    """

    t: Tensor

    def __init__(self, *, spec: QuantSpec, t_min: float = 0.1, t_max: float = 10.0, center: bool = True) -> None:
        if not 0 < t_min <= t_max < math.inf:
            raise ValueError(
                f"IRNet: 0 < t_min <= t_max must hold, got t_min={t_min}, t_max={t_max}; the paper's are 0.1 and 10"
            )
        granularity: Granularity = PerChannel(0) if spec.is_weight else PerTensor()
        super().__init__(spec=spec, granularity=granularity, center=center)
        if spec.is_weight and math.prod(spec.shape[1:]) == 1 and spec.shape[0] > 0:
            raise ValueError(
                f"IRNet: needs a weight of at least two values a filter, since balance makes a single one 0, got shape "
                f"{spec.shape}; name another quantizer for this layer, bwn for instance"
            )
        self.t_min, self.t_max = t_min, t_max
        self.register_buffer("t", torch.tensor(float(t_min)))

    def begin_step_(self, *, progress: float, key: int) -> None:
        self.t.fill_(self.t_min * 10 ** (progress * math.log10(self.t_max / self.t_min)))

    def centered(self, x: Tensor) -> Tensor:
        return standardized(x, self.granularity) if self.spec.is_weight else super().centered(x)

    def fake_quantize(self, x: Tensor) -> Tensor:
        real = self.centered(x)
        signs = straight_through(sign(real), (1 / self.t).clamp(min=1) * torch.tanh(self.t * real))
        if not self.spec.is_weight:
            return signs.to(x.dtype)
        scale = shift_scale(real.detach(), self.granularity)
        return signed_sum([signs], scale.unsqueeze(0), self.granularity).to(x.dtype)

    def factor(self, x: Tensor) -> Tensor | None:
        return shift_scale(self.centered(x), self.granularity) if self.spec.is_weight else None

    def calibrate_(self, observed: Observed) -> None:
        self.center_(observed)
        self.initialized.fill_(True)

    def stored_state(self) -> Mapping[str, NumberPart]:
        return float_parts(threshold=self.threshold if self.center else None)
