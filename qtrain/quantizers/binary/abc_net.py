"""ABC-Net: sums of several binary tensors, fitted to the weights, learned for the inputs."""

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor, nn

from qtrain.functional.affine import require_finite
from qtrain.functional.binary import plane_range
from qtrain.functional.indicator import sign
from qtrain.functional.precision import full_precision
from qtrain.functional.ste import scale_gradient, straight_through
from qtrain.quantizers.base import Quantizer, float_parts
from qtrain.spec import Granularity, Observed, PerTensor, QuantSpec
from qtrain.storage.base import NumberPart, QTensor
from qtrain.storage.planes import BitPlanes, signed_sum

MOST = 5
"""Number of bases that fit, as many as in the paper; ``bits`` says how many of them are in use."""

GRAM_RIDGE = 1e-9
"""Makes the solution unique where bases are equal, as for a constant weight: they share their factor."""


def offsets(bases: Tensor) -> Tensor:
    """``u_i = -1 + 2 (i - 1) / (M - 1)`` for ``M = bases``, 0-dim (§3.1); 0 for a single base; (MOST,) float32."""
    steps = 2 * torch.arange(MOST, device=bases.device) / (bases - 1).clamp(min=1)
    return torch.where(bases > 1, steps - 1, 0.0)


def fitted_factors(signs: Tensor, rows: Tensor) -> Tensor:
    """``alpha`` (M, G) that minimize ``||w - sum_m alpha_m B_m||`` for each row ``w``, by the normal equations.

    ``signs`` (M, G, n) are -1 and 1, or all 0 for a base that is not in use and gets 0; ``rows`` (G, n) float32.
    """
    n = max(rows.shape[1], 1)
    with full_precision(signs):
        gram = torch.einsum("agn,bgn->gab", signs, signs).double() / n
        right = torch.einsum("agn,gn->ga", signs, rows.to(signs.dtype)).double() / n
    unused = (gram.diagonal(dim1=1, dim2=2) == 0).double()
    solved: Tensor = torch.linalg.solve(gram + torch.diag_embed(unused + GRAM_RIDGE), right)
    return solved.to(rows.dtype).T


@final
class ABCNet(Quantizer):
    """Weights and inputs as sums of ``bits`` binary tensors (Lin et al. 2017, arXiv 1711.11294).

    Weights: ``W~ = sum_m alpha_m B_m``, ``B_m = sign(W - mean(W) + u_m std(W))`` with fixed ``u`` and the least-squares
    ``alpha`` of the weights at hand (§3.1); ``dC/dW = (sum_m alpha_m) dC/dW~``, straight-through for each
    base and with ``alpha`` held constant.

    Inputs: ``sum_n beta_n A_n``, ``A_n = sign(clip(x + v_n, 0, 1) - 1/2)``, whose gradient is 1 where ``0 <= x + v_n <=
    1`` (§3.2), ``beta`` and ``v`` learned. Calibration spreads the thresholds ``1/2 - v_n``, and the values of the sum,
    evenly over the observed range. The sum is symmetric about zero: after a ReLU it lacks a constant, for which the
    following batch normalization compensates. Each width has ``beta`` and ``v`` of its own.
    """

    widths = range(1, MOST + 1)
    keeps_zero = False

    shift: nn.Parameter | None
    beta: nn.Parameter | None

    def __init__(self, *, spec: QuantSpec, granularity: Granularity = PerTensor()) -> None:  # noqa: B008 - frozen
        super().__init__(spec=spec, granularity=granularity, codes=plane_range)
        for name in ("shift", "beta"):
            self.register_parameter(name, None if spec.is_weight else nn.Parameter(torch.zeros(MOST, MOST)))

    def fake_quantize(self, x: Tensor) -> Tensor:
        if self.beta is None:
            signs, alpha = self.fit(x)
            slope = self.spread(alpha.sum(dim=0), x)
            return straight_through(
                signed_sum(signs, alpha, self.granularity).to(x.dtype), scale_gradient(x, slope.to(x.dtype))
            )
        surrogates, beta = self.windows(x)
        signs = [straight_through(sign(h - 0.5), h) for h in surrogates]
        return signed_sum(signs, beta, self.granularity).to(x.dtype)

    @torch.no_grad()
    def fit(self, w: Tensor) -> tuple[list[Tensor], Tensor]:
        """``B`` of the weight ``w``, each of its shape, and ``alpha`` (MOST, *state), 0 for bases not in use."""
        real = w.float()
        rows = self.granularity.flatten(real)
        n = max(rows.shape[1], 1)
        mean = rows.sum(dim=1, keepdim=True) / n
        std = ((rows - mean).square().sum(dim=1) / n).sqrt().reshape(self.state_shape)
        centered = real - self.spread(mean.reshape(self.state_shape), w)
        std, u, used = self.spread(std, w), offsets(self.bits), self.used()
        signs = [sign(centered + u[m] * std) for m in range(MOST)]
        bases = torch.stack([self.granularity.flatten(signs[m]) * used[m] for m in range(MOST)])
        return signs, fitted_factors(bases, rows).reshape(MOST, *self.state_shape)

    def windows(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """``clip(x + v_n, 0, 1)`` of the input ``x``, each of its shape, and ``beta`` (MOST,), 0 where not in use."""
        assert self.shift is not None
        assert self.beta is not None
        row = (self.bits - 1).reshape(1)
        shift = self.shift.index_select(0, row).squeeze(0)
        beta = self.beta.index_select(0, row).squeeze(0) * self.used()
        return [(x.float() + shift[n]).clamp(0, 1) for n in range(MOST)], beta

    def used(self) -> Tensor:
        """1 for the first ``bits`` of all bases, else 0; (MOST,) float32."""
        return (torch.arange(MOST, device=self.bits.device) < self.bits).float()

    @torch.no_grad()
    def quantize(self, x: Tensor) -> QTensor:
        require_finite(x)
        if self.beta is None:
            signs, scale = self.fit(x)
        else:
            surrogates, scale = self.windows(x)
            signs = [h - 0.5 for h in surrogates]
        bits = int(self.bits)
        return BitPlanes(
            codes=torch.stack([(s >= 0).to(torch.int32) for s in signs[:bits]]),
            bits=bits,
            low=0,
            high=1,
            dtype=x.dtype,
            scale=scale[:bits].clone(),
            granularity=self.granularity,
        )

    @torch.no_grad()
    def calibrate_(self, observed: Observed) -> None:
        if self.shift is not None and self.beta is not None:
            for bits in self.widths:
                step = (observed.high - observed.low) / bits
                thresholds = observed.low + step * (torch.arange(bits, device=step.device) + 0.5)
                self.shift[bits - 1, :bits] = 0.5 - thresholds
                self.beta[bits - 1, :bits] = step / 2
        self.initialized.fill_(True)

    def stored_state(self) -> Mapping[str, NumberPart]:
        if self.shift is None or self.beta is None:
            return {}
        used = int(self.bits)
        return float_parts(shift=self.shift[used - 1, :used], beta=self.beta[used - 1, :used])
