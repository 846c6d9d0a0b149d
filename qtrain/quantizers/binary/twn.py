"""Ternary weight networks: -alpha, 0 and alpha, the least-squares ones or nearly."""

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from qtrain.functional.affine import require_finite
from qtrain.functional.indicator import above
from qtrain.functional.ste import straight_through
from qtrain.functional.ternary import best_ternary_threshold, mean_above, usual_threshold
from qtrain.quantizers.base import Quantizer
from qtrain.spec import Granularity, Observed, PerTensor, QuantSpec
from qtrain.storage.affine import AffineTensor
from qtrain.storage.base import NumberPart, QTensor


def ternary_range(bits: int, signed: bool) -> tuple[int, int]:
    """Codes -1, 0 and 1."""
    return -1, 1


@final
class TWN(Quantizer):
    """``W~ = alpha T``, ``T = sign(W) [|W| > Delta]`` (Li et al. 2016, arXiv 1605.04711, eq. 3); weights only.

    ``Delta = 0.7 mean |W|`` (eq. 6) and ``alpha`` the mean of ``|W|`` above ``Delta`` (eq. 5), nearly the least-squares
    choice; with ``exact`` that choice itself (:func:`best_ternary_threshold`, eq. 4). Both follow the
    weights in training and in eval mode. The gradient of ``W~`` goes to ``W`` as it is. Codes take 2 bits.
    """

    widths = range(2, 3)
    serves = frozenset({"weight"})

    def __init__(
        self,
        *,
        spec: QuantSpec,
        granularity: Granularity = PerTensor(),  # noqa: B008 - frozen
        exact: bool = False,
    ) -> None:
        super().__init__(spec=spec, granularity=granularity, codes=ternary_range)
        self.exact = exact

    @torch.no_grad()
    def ternary(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """``T`` of -1, 0 and 1, shaped as ``w``, and ``alpha`` of the state shape; both float32."""
        real = w.float()
        rows = self.granularity.flatten(real)
        threshold = best_ternary_threshold(rows) if self.exact else usual_threshold(rows)
        alpha = mean_above(rows, threshold).reshape(self.state_shape)
        return real.sign() * above(real.abs(), self.spread(threshold.reshape(self.state_shape), w)), alpha

    def fake_quantize(self, x: Tensor) -> Tensor:
        signs, alpha = self.ternary(x)
        return straight_through((signs * self.spread(alpha, x)).to(x.dtype), x)

    def quantize(self, x: Tensor) -> QTensor:
        require_finite(x)
        signs, alpha = self.ternary(x)
        return AffineTensor(
            codes=signs.to(torch.int32),
            bits=2,
            low=-1,
            high=1,
            dtype=x.dtype,
            scale=alpha,
            granularity=self.granularity,
        )

    def calibrate_(self, observed: Observed) -> None:
        self.initialized.fill_(True)

    def stored_state(self) -> Mapping[str, NumberPart]:
        return {}
