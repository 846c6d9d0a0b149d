"""Learned levels (LQ-Nets): a few basis values, whose sums with binary digits are the levels."""

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from qtrain.functional.affine import require_finite
from qtrain.functional.levels import bucket
from qtrain.functional.ranks import mean_of_ranks
from qtrain.functional.ste import clamp_to, straight_through
from qtrain.quantizers.base import Quantizer, float_parts
from qtrain.spec import Granularity, Observed, PerTensor, QuantSpec
from qtrain.storage.base import NumberPart, QTensor
from qtrain.storage.codebook import look_up
from qtrain.storage.planes import BitPlanes, signed_sum

BASIS_RIDGE = 1e-5
"""Keeps least squares defined where the data leave a direction open, relative to digits of magnitude 1."""

_CALIBRATION_STEPS = 20


def binary_digit(bits: int, signed: bool) -> tuple[int, int]:
    """Codes are the digits of the planes, 0 and 1, whatever they stand for."""
    return 0, 1


def encode_in_basis(
    x: Tensor, basis: Tensor, signed: Tensor, granularity: Granularity
) -> tuple[list[Tensor], Tensor, Tensor]:
    """The digits of the level nearest to ``x``: M tensors of 0 and 1 (int64); and the lowest and the highest level.

    Levels are ``sum_m d_m v_m`` with digits of -1 and 1, of 0 and 1 where not ``signed`` (0-dim); ``basis`` v
    (M, *state), float32. Between two neighbors their midpoint decides (eq. 5), the lower level at a tie.
    """
    planes = len(basis)
    shifts = torch.arange(planes - 1, -1, -1, device=basis.device)
    words = ((torch.arange(2**planes, device=basis.device)[:, None] >> shifts) & 1).to(basis.dtype)
    digits = torch.where(signed, 2 * words - 1, words)
    levels, order = (digits @ basis.reshape(planes, basis[0].numel())).sort(dim=0, stable=True)
    levels, order = (found.reshape(len(words), *basis.shape[1:]) for found in (levels, order))
    thresholds = (levels[:-1] + levels[1:]) / 2
    if thresholds.ndim == 1:
        rank = bucket(x, thresholds)
    else:
        rank = torch.zeros_like(x, dtype=torch.int64)
        for threshold in thresholds:
            rank = rank + (x > granularity.expand(threshold, tuple(x.shape)))
    word = look_up(rank, order.movedim(0, -1).contiguous(), granularity)
    return [(word >> (planes - 1 - m)) & 1 for m in range(planes)], levels[0], levels[-1]


def least_squares(rows: Tensor, digits: Tensor, basis: Tensor, *, shared: bool = False) -> Tensor:
    """The basis (M, G) that fits ``rows`` (G, n) best for given ``digits`` (M, G, n): ``(B B^T)^-1 B x`` (eq. 8).

    It is computed as a correction of the present ``basis``. A ridge of 1e-5 keeps the present value where the data
    determine none, so that the squared error never grows and equal digits do not lead to a division by zero. With
    ``shared`` the fit is over the rows of all ranks.
    """
    count = max(rows.shape[1], 1)
    gram = torch.einsum("mgn,kgn->gmk", digits, digits) / count
    missing = torch.einsum("mgn,gn->gm", digits, rows - (digits * basis[:, :, None]).sum(dim=0)) / count
    if shared:
        gram, missing = mean_of_ranks(gram), mean_of_ranks(missing)
    ridge = BASIS_RIDGE * torch.eye(len(digits), device=rows.device)
    correction: Tensor = torch.linalg.solve_ex(gram + ridge, missing).result
    return basis + correction.T


@final
class LQNets(Quantizer):
    """Levels ``sum_m d_m v_m``, digits -1 and 1, or 0 and 1 where nothing is negative (Zhang 2018, arXiv 1807.10029).

    The basis ``v``, ``bits`` values for each group, is not learned by gradient. In each training forward the levels'
    digits give its least-squares successor (QEM, algorithm 1, with T = 1), toward which it moves: ``v <- decay v + (1 -
    decay) v*``; the values of that forward use the basis before the move. For an input the fit is over the batch of all
    ranks. The gradient passes straight through: everywhere for weights, between the outer levels for inputs (eq. 10).

    Calibration starts from even levels over the observed range; of a weight, QEM then goes on until it settles, 20
    steps at most. The paper has a basis for each filter (``granularity@...: channel``) and one for all activations of a
    layer.

    The number of signed levels is even, and zero is not one of them. The basis has ``bits`` values: a change of bits
    needs a new conversion.
    """

    widths = range(1, 5)
    keeps_zero = False
    switchable = False

    basis: Tensor

    def __init__(
        self,
        *,
        spec: QuantSpec,
        granularity: Granularity = PerTensor(),  # noqa: B008 - frozen
        decay: float = 0.9,
    ) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"LQNets: decay must be in [0, 1), got {decay}; 0.9 as in the paper")
        super().__init__(spec=spec, granularity=granularity, codes=binary_digit)
        self.decay = decay
        powers = torch.exp2(torch.arange(float(spec.bits))).reshape(-1, *(1 for _ in self.state_shape))
        self.register_buffer("basis", powers.expand(spec.bits, *self.state_shape) / (2**spec.bits - 1))

    def fake_quantize(self, x: Tensor) -> Tensor:
        values = x.detach().to(self.basis.dtype)
        codes, lowest, highest = encode_in_basis(values, self.basis, self.signed, self.granularity)
        digits = [torch.where(self.signed, 2 * code - 1, code) for code in codes]
        result = signed_sum(digits, self.basis, self.granularity).to(x.dtype)
        if self.training:
            self.update_(values, digits, self.decay)
        if self.spec.is_weight:
            return straight_through(result, x)
        inside = clamp_to(x.to(values.dtype), self.spread(lowest, x), self.spread(highest, x))
        return straight_through(result, inside.to(x.dtype))

    @torch.no_grad()
    def update_(self, values: Tensor, digits: list[Tensor], decay: float) -> None:
        """Move the basis toward the least-squares one for ``values`` and the digits that they have."""
        rows = self.granularity.flatten(values)
        planes = torch.stack([self.granularity.flatten(plane) for plane in digits]).to(values.dtype)
        basis = self.basis.reshape(len(digits), len(rows))
        shared = self.training and not self.spec.is_weight
        best = least_squares(rows, planes, basis, shared=shared).reshape(self.basis.shape)
        self.basis.copy_(decay * self.basis + (1 - decay) * best)

    def quantize(self, x: Tensor) -> QTensor:
        require_finite(x)
        codes, _, _ = encode_in_basis(x.detach().to(self.basis.dtype), self.basis, self.signed, self.granularity)
        return BitPlanes(
            codes=torch.stack(codes).to(torch.int32),
            bits=int(self.bits),
            low=int(self.code_low),
            high=int(self.code_high),
            dtype=x.dtype,
            scale=self.basis.clone(),
            granularity=self.granularity,
            unsigned=not bool(self.signed),
        )

    @torch.no_grad()
    def calibrate_(self, observed: Observed) -> None:
        self.choose_sign_(observed)
        reach = torch.maximum(observed.low.abs(), observed.high.abs())
        powers = torch.exp2(torch.arange(float(self.spec.bits), device=reach.device))
        self.basis.copy_(powers.reshape(-1, *(1 for _ in self.state_shape)) * reach / (2**self.spec.bits - 1))
        if observed.tensor is not None:
            values = observed.tensor.float()
            for _ in range(_CALIBRATION_STEPS):
                before = self.basis.clone()
                codes, _, _ = encode_in_basis(values, self.basis, self.signed, self.granularity)
                self.update_(values, [torch.where(self.signed, 2 * code - 1, code) for code in codes], 0.0)
                if torch.allclose(before, self.basis, rtol=1e-4, atol=0):
                    break
        self.initialized.fill_(True)

    def stored_state(self) -> Mapping[str, NumberPart]:
        return float_parts(basis=self.basis)
