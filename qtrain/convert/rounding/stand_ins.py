"""What stands in the quantizers' places while rounding is learned."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from qtrain.convert.rounding.base import Candidates
from qtrain.functional.random import keyed_uniform
from qtrain.quantizers.base import Quantizer

GAMMA, ZETA = -0.1, 1.1
"""The sigmoid is stretched to ``(GAMMA, ZETA)`` and cut to [0, 1], so that 0 and 1 are reached (eq. 23)."""


def rectified_sigmoid(variable: Tensor) -> Tensor:
    """``h(V) = clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1)`` (Nagel et al. 2020, arXiv 2004.10568, eq. 23)."""
    return (variable.sigmoid() * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def inverse_rectified_sigmoid(share: Tensor) -> Tensor:
    """The ``V`` with ``h(V) = share``, for ``share`` in [0, 1]."""
    return ((share - GAMMA) / (ZETA - GAMMA)).logit()


def undecided(share: Tensor, beta: float) -> Tensor:
    """``1 - |2h - 1|^beta`` (eq. 24): 0 where ``h`` is 0 or 1, 1 where it is a half; the larger beta, the flatter."""
    return 1 - (2 * share - 1).abs() ** beta


def annealed(progress: float, *, start: float, end: float, warmup: float) -> float | None:
    """Beta at ``progress`` (0 to 1): from ``start`` linearly to ``end``; ``None``, no regulariser, in the ``warmup``.

    A high beta leaves most of the variables to the reconstruction; as it falls, they are driven to 0 and 1 (§3.2).
    """
    return None if progress < warmup else start + (end - start) * (progress - warmup) / (1 - warmup)


@final
class SoftWeight(nn.Module):
    """Instead of a weight quantizer ``down + h(V) (up - down)``; ``V`` starts where that is the weight itself."""

    enabled = True

    def __init__(self, chosen: Candidates) -> None:
        super().__init__()
        self.chosen = chosen
        self.down, self.gap = chosen.down.float(), (chosen.up - chosen.down).float()
        self.variable = nn.Parameter(inverse_rectified_sigmoid((chosen.steps - chosen.steps.floor()).float()))

    def share(self) -> Tensor:
        """``h(V)`` of the places where there is a choice, (n,)."""
        return rectified_sigmoid(self.variable[self.chosen.free])

    def forward(self, weight: Tensor) -> Tensor:
        return (self.down + rectified_sigmoid(self.variable) * self.gap).to(weight.dtype)

    @torch.no_grad()
    def settled(self) -> Tensor:
        """The values decided for: ``up`` where ``h(V)`` is at least a half."""
        chosen = self.chosen
        up = rectified_sigmoid(self.variable) >= 0.5
        return torch.where(chosen.free, torch.where(up, chosen.up, chosen.down), chosen.nearest)


@final
class Dropped(nn.Module):
    """Instead of an input quantizer ``Q``: each value is ``x`` with probability ``drop``, otherwise ``Q(x)``.

    Wei et al. 2022, QDrop, arXiv 2203.05740, eq. 9. Draws are a function of ``key`` and the value's place.
    """

    enabled = True

    def __init__(self, quantizer: Quantizer, *, drop: float) -> None:
        super().__init__()
        self.quantizer, self.drop = quantizer, drop
        self.register_buffer("key", torch.zeros((), dtype=torch.int64, device=quantizer.bits.device))

    key: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return mixed(x, self.quantizer(x), drop=self.drop, key=self.key)


def mixed(exact: Tensor, quantised: Tensor, *, drop: float, key: Tensor) -> Tensor:
    """``exact`` with probability ``drop`` for each value, otherwise ``quantised``; a function of ``key`` and place."""
    return torch.where(keyed_uniform(key, tuple(exact.shape)) < drop, exact, quantised)
