"""Trained ternary quantization: a learned value for each sign, and zero."""

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor, nn

from qtrain.functional.affine import require_finite
from qtrain.functional.indicator import above
from qtrain.functional.ste import scale_gradient, straight_through
from qtrain.functional.ternary import mean_above
from qtrain.quantizers.base import Quantizer
from qtrain.spec import Observed, PerTensor, QuantSpec
from qtrain.storage.base import NumberPart, QTensor


def three_indices(bits: int, signed: bool) -> tuple[int, int]:
    """Codes 0, 1 and 2, for the negative value, zero and the positive value."""
    return 0, 2


@final
class TTQ(Quantizer):
    """``-W_n``, 0 or ``W_p`` as ``w < -Delta``, between, or ``w > Delta`` (Zhu et al. 2017, arXiv 1612.01064, eq. 6).

    ``Delta = threshold max |w|`` of the tensor (eq. 9). ``W_p`` and ``W_n`` are learned: each gets the sum of the
    gradients of the weights that have it (eq. 7; with the minus of ``-W_n``, which the paper leaves out). The gradient
    of a latent weight is scaled by ``W_p``, 1 or ``W_n`` (eq. 8). Calibration starts them at the mean magnitude beyond
    ``Delta`` on either side. Weights only.
    """

    widths = range(2, 3)
    serves = frozenset({"weight"})

    positive: nn.Parameter
    negative: nn.Parameter

    def __init__(self, *, spec: QuantSpec, threshold: float = 0.05) -> None:
        if not 0 <= threshold < 1:
            raise ValueError(f"TTQ: threshold, a share of max |w|, must be in [0, 1), got {threshold}; 0.05 is usual")
        super().__init__(spec=spec, granularity=PerTensor(), codes=three_indices)
        self.threshold = threshold
        self.positive = nn.Parameter(torch.ones(()))
        self.negative = nn.Parameter(torch.ones(()))

    @torch.no_grad()
    def signs(self, w: Tensor) -> Tensor:
        """-1, 0 or 1 for each weight, float32."""
        real = w.float()
        if real.numel() == 0:
            return real
        return real.sign() * above(real.abs(), self.threshold * real.abs().max())

    def fake_quantize(self, x: Tensor) -> Tensor:
        signs = self.signs(x)
        positive, negative = signs.clamp(min=0), signs.clamp(max=0).neg()
        with torch.no_grad():
            slope = self.positive * positive + self.negative * negative + (1 - positive - negative)
        learned = self.positive * positive - self.negative * negative
        return straight_through(learned, learned + scale_gradient(x.float(), slope)).to(x.dtype)

    def quantize(self, x: Tensor) -> QTensor:
        require_finite(x)
        positive, negative = self.positive.detach(), self.negative.detach()
        values = torch.stack([-negative, torch.zeros_like(positive), positive])
        return self.codebook_tensor(x, self.signs(x) + 1, values, operand=2)  # two sums of inputs, each times its scale

    @torch.no_grad()
    def calibrate_(self, observed: Observed) -> None:
        assert observed.tensor is not None, "weights are observed with the tensor itself"
        w = observed.tensor.detach().float().reshape(1, -1)
        delta = self.threshold * w.abs().max(dim=1).values
        self.positive.copy_(mean_above(w.clamp(min=0), delta).squeeze())
        self.negative.copy_(mean_above(w.clamp(max=0), delta).squeeze())
        self.initialized.fill_(True)

    def stored_state(self) -> Mapping[str, NumberPart]:
        return {}
