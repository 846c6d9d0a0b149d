"""Blending: the forward moves from the real to the quantized value while training goes on."""

from typing import final

import torch
from torch import Tensor

from qtrain.quantizers.base import MakeQuantizer
from qtrain.quantizers.hooks import Rate, checked_share, project, rate_at
from qtrain.quantizers.wrappers.wrapper import TrainingWrapper
from qtrain.spec import QuantSpec


def blend(x: Tensor, quantized: Tensor, share: Tensor) -> Tensor:
    """``(1 - share) x + share quantized``, computed in float32, of ``x``'s type; exact at ``share`` 0 and 1."""
    return ((1 - share) * x.float() + share * quantized.float()).to(x.dtype)


@final
class Blend(TrainingWrapper):
    """``(1 - share) x + share Q(x)`` in training, ``Q`` another quantizer (Liu and Mattina 2019, arXiv 1903.01061).

    ``share`` is a number in [0, 1] or a schedule, from 0 to 1 as a rule; in eval mode the value is ``Q(x)``. The
    gradient of the real part is exact, ``1 - share``. With ``straight_through``, ``share`` times the gradient of ``Q``
    is added, so that the estimate enters as slowly as the rounding. Without it, as in the paper, nothing is added, and
    nothing moves ``x`` once ``share`` is 1. The parameters of ``Q`` get their gradient either way.
    """

    share: Tensor

    def __init__(
        self, *, spec: QuantSpec, quantizer: MakeQuantizer, share: Rate, straight_through: bool = True
    ) -> None:
        checked_share("Blend", "share", share)
        super().__init__(spec=spec, quantizer=quantizer)
        self.schedule, self.straight_through = share, straight_through
        self.register_buffer("share", torch.tensor(rate_at(share, 0.0)))

    def begin_step_(self, *, progress: float, key: int) -> None:
        self.share.fill_(rate_at(self.schedule, progress))

    def train_forward(self, x: Tensor) -> Tensor:
        return blend(x, self.inner(x if self.straight_through else x.detach()), self.share)

    def project(self, weight: Tensor) -> Tensor:
        return project(self.inner, weight)
