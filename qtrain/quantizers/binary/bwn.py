"""Binary-Weight-Networks: the sign of each weight times the mean magnitude of its filter."""

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from qtrain.functional.binary import mean_magnitude
from qtrain.functional.indicator import above, sign
from qtrain.functional.ste import scale_gradient, straight_through
from qtrain.quantizers.binary.binary import Binary
from qtrain.spec import Granularity, Observed, PerChannel, QuantSpec
from qtrain.storage.base import NumberPart
from qtrain.storage.planes import signed_sum


@final
class BWN(Binary):
    """``W~ = alpha sign(W)``, ``alpha = mean |W|`` of the filter (Rastegari et al. 2016, arXiv 1603.05279, eq. 6).

    That is the least-squares choice among all ``alpha B`` with binary ``B``. ``alpha`` follows the weights in training
    and in eval mode. The gradient is the paper's, element by element: ``dC/dW = dC/dW~ (1/n + 1[|W| <= 1] alpha)``
    (§3.1), ``n`` the elements that share an ``alpha``. Weights only.
    """

    serves = frozenset({"weight"})

    def __init__(self, *, spec: QuantSpec, granularity: Granularity = PerChannel(0)) -> None:  # noqa: B008 - frozen
        super().__init__(spec=spec, granularity=granularity)

    def fake_quantize(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            alpha = self.factor(x)
            values = signed_sum([sign(x)], alpha.unsqueeze(0), self.granularity).to(x.dtype)
            shared = x.numel() // max(alpha.numel(), 1)
            slope = 1 / max(shared, 1) + (1 - above(x.abs(), 1.0)) * self.spread(alpha, x)
        return straight_through(values, scale_gradient(x, slope))

    def factor(self, x: Tensor) -> Tensor:
        return mean_magnitude(x, self.granularity)

    def calibrate_(self, observed: Observed) -> None:
        self.initialized.fill_(True)

    def stored_state(self) -> Mapping[str, NumberPart]:
        return {}
