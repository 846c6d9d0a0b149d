"""BNN+: a sign with a smooth gradient and a learned factor, and a regularizer that draws weights to its values."""

from collections.abc import Mapping
from typing import Literal, final

import torch
from torch import Tensor, nn

from qtrain.functional.indicator import sign
from qtrain.functional.ste import straight_through, with_penalty
from qtrain.quantizers.base import float_parts
from qtrain.quantizers.binary.binary import Binary
from qtrain.spec import Granularity, Observed, PerTensor, QuantSpec
from qtrain.storage.base import NumberPart
from qtrain.storage.planes import signed_sum


def swish_sign(x: Tensor, beta: float) -> Tensor:
    """``SS_beta(x) = 2 s(beta x) (1 + beta x (1 - s(beta x))) - 1`` with the sigmoid ``s`` (arXiv 1812.11800).

    Nearer the sign for larger ``beta``; its slope is ``beta`` at zero and slightly negative beyond 2.4 / beta.
    """
    t = beta * x
    # 1 - s as the sigmoid of -t, which does not cancel for large t.
    return 2 * torch.sigmoid(t) * (1 + t * torch.sigmoid(-t)) - 1


def distance_to_binary(w: Tensor, alpha: Tensor, kind: str) -> Tensor:
    """The regularizer: the sum of ``|alpha - |w||`` (``l1``) or ``(alpha - |w|)^2`` (``l2``), 0-dim."""
    off = alpha - w.abs()
    return (off.abs() if kind == "l1" else off.square()).sum()


@final
class BNNPlus(Binary):
    """``x^ = alpha sign(x)`` with the slope of ``SS_beta`` for the sign's and a learned ``alpha`` (arXiv 1812.11800).

    ``alpha`` starts at ``mean |x|``. For weights, the loss gets an additional ``strength`` times
    :func:`distance_to_binary`, with ``regularizer`` ``l1`` or ``l2``. It draws the weights to ``-alpha`` and ``alpha``,
    and ``alpha`` to the median or the mean of their magnitudes. Inputs have no regularizer. ``center``: see
    :class:`Binary`.
    """

    alpha: nn.Parameter
    penalty_share = 1.0

    def __init__(
        self,
        *,
        spec: QuantSpec,
        granularity: Granularity = PerTensor(),  # noqa: B008 - frozen
        beta: float = 5.0,
        regularizer: Literal["l1", "l2"] = "l2",
        strength: float = 1e-6,
        center: bool = True,
    ) -> None:
        if not beta > 0:
            raise ValueError(f"BNNPlus: beta must be positive, got {beta}; 5 is usual, and larger is nearer the sign")
        if regularizer not in ("l1", "l2"):
            raise ValueError(f"BNNPlus: regularizer must be 'l1' or 'l2', got {regularizer!r}")
        if not strength >= 0:
            raise ValueError(f"BNNPlus: strength must be at least 0, got {strength}; 0 is without regularizer")
        super().__init__(spec=spec, granularity=granularity, center=center)
        self.beta, self.regularizer, self.strength = beta, regularizer, strength
        self.alpha = nn.Parameter(torch.ones(self.state_shape))

    def fake_quantize(self, x: Tensor) -> Tensor:
        real = self.centered(x)
        if self.spec.is_weight and self.strength:
            penalty = distance_to_binary(real, self.spread(self.alpha, x), self.regularizer)
            real = with_penalty(real, self.penalty_share * self.strength * penalty)
        signs = straight_through(sign(real), swish_sign(real, self.beta))
        return signed_sum([signs], self.alpha.unsqueeze(0), self.granularity).to(x.dtype)

    def factor(self, x: Tensor) -> Tensor:
        return self.alpha.detach()

    @torch.no_grad()
    def calibrate_(self, observed: Observed) -> None:
        self.alpha.copy_(observed.mean_abs)
        self.center_(observed)
        self.initialized.fill_(True)

    def stored_state(self) -> Mapping[str, NumberPart]:
        return float_parts(alpha=self.alpha, threshold=self.threshold if self.center else None)
