"""ProxQuant: real weights in the forward, drawn to the quantized ones after each step."""

from typing import Literal, final

import torch
from torch import Tensor

from qtrain.quantizers.base import MakeQuantizer
from qtrain.quantizers.hooks import Rate, project, rate_at
from qtrain.quantizers.wrappers.wrapper import TrainingWrapper
from qtrain.spec import QuantSpec


def prox_l1(w: Tensor, quantized: Tensor, rate: Tensor) -> Tensor:
    """The proximal operator of ``rate |w - Q(w)|``: the weight moves by ``rate`` toward the quantized value, and not
    past it."""
    off = w - quantized
    return quantized + off.sign() * (off.abs() - rate).clamp(min=0)


def prox_l2(w: Tensor, quantized: Tensor, rate: Tensor) -> Tensor:
    """The proximal operator of ``rate (w - Q(w))^2``: ``(w + 2 rate Q(w)) / (1 + 2 rate)``."""
    return (w + 2 * rate * quantized) / (1 + 2 * rate)


@final
class ProxQuant(TrainingWrapper):
    """Training without straight-through estimation (Bai et al. 2019, arXiv 1810.00861); weights only.

    In training the forward has the real weight, with its exact gradient, and after each step the weight is drawn to its
    quantized value ``Q(w)``, ``Q`` another quantizer, by the proximal operator of the W-shaped regularizer:
    :func:`prox_l1` or :func:`prox_l2` with the ``rate`` of the step, a number or, as in the paper, a schedule that
    rises from 0. ``rate`` is the product of the paper's learning rate and lambda: of ``l1`` in units of the weight, of
    ``l2`` without unit. From progress ``hard_from`` on, weights are quantized in training as well and set to their
    quantized values after each step, while the rest of the model adapts to them.
    """

    serves = frozenset({"weight"})

    rate: Tensor
    hard: Tensor

    def __init__(
        self,
        *,
        spec: QuantSpec,
        quantizer: MakeQuantizer,
        rate: Rate,
        norm: Literal["l1", "l2"] = "l1",
        hard_from: float = 0.8,
    ) -> None:
        if norm not in ("l1", "l2"):
            raise ValueError(f"ProxQuant: norm must be 'l1' or 'l2', got {norm!r}")
        if not 0 <= hard_from <= 1:
            raise ValueError(f"ProxQuant: hard_from is a share of the run and must be in [0, 1], got {hard_from}")
        if not callable(rate) and not rate >= 0:
            raise ValueError(f"ProxQuant: rate must be at least 0, got {rate}; or give a schedule with such values")
        super().__init__(spec=spec, quantizer=quantizer)
        self.schedule, self.norm, self.hard_from = rate, norm, hard_from
        self.register_buffer("rate", torch.tensor(rate_at(rate, 0.0)))
        self.register_buffer("hard", torch.tensor(hard_from == 0))

    def begin_step_(self, *, progress: float, key: int) -> None:
        self.rate.fill_(rate_at(self.schedule, progress))
        self.hard.fill_(progress >= self.hard_from)

    def train_forward(self, x: Tensor) -> Tensor:
        return torch.where(self.hard, self.inner(x), x)

    @torch.no_grad()
    def project(self, weight: Tensor) -> Tensor:
        weight = project(self.inner, weight)
        quantized = self.inner(weight)
        drawn = (prox_l1 if self.norm == "l1" else prox_l2)(weight, quantized, self.rate)
        return torch.where(self.hard, quantized, drawn)
