"""Learned levels (LQ-Nets): a few basis values, whose sums with binary digits are the levels."""

from collections.abc import Mapping
from functools import reduce
from typing import final

import torch
from torch import Tensor

from qtrain.functional.affine import require_finite
from qtrain.functional.ranks import mean_of_ranks
from qtrain.functional.ste import clamp_to, straight_through
from qtrain.quantizers.base import Quantizer, float_parts
from qtrain.quantizers.codebook.group_levels import nearest_rank, nearest_value, sums_by_level
from qtrain.spec import Granularity, Observed, PerTensor, QuantSpec
from qtrain.storage.base import NumberPart, QTensor
from qtrain.storage.codebook import look_up
from qtrain.storage.planes import BitPlanes

BASIS_RIDGE = 1e-5
"""Keeps least squares defined where the data leave a direction open, relative to digits of magnitude 1."""

_CALIBRATION_STEPS = 20


def binary_digit(bits: int, signed: bool) -> tuple[int, int]:
    """Codes are the digits of the planes, 0 and 1, whatever they stand for."""
    return 0, 1


def sorted_levels(basis: Tensor, signed: Tensor) -> tuple[Tensor, Tensor]:
    """The levels ``sum_m d_m v_m`` in ascending order, (2^M, *state), and their digits (2^M, M, *state), float32.

    Digits are -1 and 1, or 0 and 1 where not ``signed`` (0-dim); ``basis`` v is (M, *state). The sum goes from the
    first plane to the last, as that of the stored planes does.
    """
    planes, state, basis = len(basis), basis.shape[1:], basis.float()
    shifts = torch.arange(planes - 1, -1, -1, device=basis.device)
    words = ((torch.arange(2**planes, device=basis.device)[:, None] >> shifts) & 1).to(basis.dtype)
    digits = torch.where(signed, 2 * words - 1, words).reshape(*words.shape, *(1 for _ in state))
    levels, order = reduce(torch.add, [digits[:, m] * basis[m] for m in range(planes)]).sort(dim=0, stable=True)
    return levels, digits.expand(*words.shape, *state).gather(0, order.unsqueeze(1).expand(*words.shape, *state))


def least_squares(basis: Tensor, digits: Tensor, counts: Tensor, missing: Tensor) -> Tensor:
    """The basis (M, G) that fits values best as sums of the digits they have: ``(B B^T)^-1 B x`` (eq. 8).

    What it needs of the values is, for each of L levels, how many are nearest to it, ``counts`` (L, G), and the sum of
    value minus level over these, ``missing`` (L, G). ``digits`` (L, M, G) are the level's. It is computed as a
    correction of the present ``basis``. A ridge of 1e-5 keeps the present value where the data determine none, so that
    the squared error never grows and equal digits do not lead to a division by zero.
    """
    number = counts.sum(dim=0).clamp(min=1)
    # Products and sums, which autocast leaves in float32.
    weighted = digits * (counts / number).unsqueeze(1)
    gram = (weighted.unsqueeze(2) * digits.unsqueeze(1)).sum(dim=0).movedim(-1, 0)
    error = (digits * (missing / number).unsqueeze(1)).sum(dim=0).T
    ridge = BASIS_RIDGE * torch.eye(len(basis), device=basis.device)
    correction: Tensor = torch.linalg.solve_ex(gram + ridge, error).result
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
        values = x.detach().float()
        levels, digits = sorted_levels(self.basis, self.signed)
        result = nearest_value(values, levels, self.granularity)
        if self.training:
            self.update_(values, result, levels, digits, self.decay)
        if self.spec.is_weight:
            return straight_through(result.to(x.dtype), x)
        inside = clamp_to(x.to(values.dtype), self.spread(levels[0], x), self.spread(levels[-1], x))
        return straight_through(result.to(x.dtype), inside.to(x.dtype))

    @torch.no_grad()
    def update_(self, values: Tensor, result: Tensor, levels: Tensor, digits: Tensor, decay: float) -> None:
        """Move the basis toward the least-squares one for ``values`` and the digits of the levels ``result``."""
        counts, missing = sums_by_level(values, values - result, levels, self.granularity)
        if self.training and not self.spec.is_weight:
            counts, missing = mean_of_ranks(counts), mean_of_ranks(missing)
        planes, groups = len(self.basis), counts.shape[1]
        best = least_squares(
            self.basis.float().reshape(planes, groups), digits.reshape(len(levels), planes, groups), counts, missing
        )
        self.basis.copy_(decay * self.basis + (1 - decay) * best.reshape(self.basis.shape))

    def quantize(self, x: Tensor) -> QTensor:
        require_finite(x)
        levels, digits = sorted_levels(self.basis, self.signed)
        rank = nearest_rank(x.detach().float(), levels, self.granularity)
        codes = [
            look_up(rank, digits[:, m].movedim(0, -1).contiguous(), self.granularity) for m in range(len(self.basis))
        ]
        return BitPlanes(
            codes=(torch.stack(codes) > 0).to(torch.int32),
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
                levels, digits = sorted_levels(self.basis, self.signed)
                self.update_(values, nearest_value(values, levels, self.granularity), levels, digits, 0.0)
                if torch.allclose(before, self.basis, rtol=1e-4, atol=0):
                    break
        self.initialized.fill_(True)

    def stored_state(self) -> Mapping[str, NumberPart]:
        return float_parts(basis=self.basis)
