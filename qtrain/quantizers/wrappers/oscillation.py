"""Oscillation: weights that alternate between two codes are counted, dampened and frozen."""

from typing import final

import torch
from torch import Tensor

from qtrain.functional.clamping import clamp_
from qtrain.functional.oscillation import distance_to_codes, ema, turned_back
from qtrain.functional.ste import with_penalty
from qtrain.quantizers.base import MakeQuantizer, Quantizer
from qtrain.quantizers.hooks import EvenSteps, Rate, project, rate_at
from qtrain.quantizers.wrappers.wrapper import TrainingWrapper, Wrapper, innermost
from qtrain.spec import QuantSpec

OSCILLATES = 0.005
"""The frequency above which the paper's tables call a weight oscillating."""


@final
class Oscillation(TrainingWrapper):
    """Counts how often each weight's code turns back, and may dampen and freeze those (Nagel 2022, arXiv 2203.11086).

    Around any quantizer with evenly spaced codes. After each optimizer step: a code that changed in the direction
    opposite to its last change oscillates; the frequency is an average with ``momentum`` (§4.1).

    ``dampening`` is the factor of ``|Q(w) - clip(w)|^2`` in the loss (§4.2), a number or a schedule; the paper's rises
    along a cosine from 0. With a ``threshold``, a number or a schedule (the paper's falls, from 0.1 to 0.01 for
    instance), a weight with a higher frequency is frozen: its code becomes the rounded average of its codes and stays,
    while the scale goes on learning (§4.3, algorithm 1). ``None`` freezes nothing. In eval mode and in storage it is
    the inner quantizer. After a change of bits all is counted anew, and nothing is frozen.
    """

    serves = frozenset({"weight"})
    penalty_share = 1.0

    dampening: Tensor
    threshold: Tensor
    counted_bits: Tensor
    code: Tensor
    direction: Tensor
    frequency: Tensor
    average: Tensor
    frozen: Tensor

    def __init__(
        self,
        *,
        spec: QuantSpec,
        quantizer: MakeQuantizer,
        dampening: Rate = 0.0,
        threshold: Rate | None = None,
        momentum: float = 0.01,
    ) -> None:
        if not callable(dampening) and not dampening >= 0:
            raise ValueError(f"Oscillation: dampening must be at least 0, got {dampening}; 0 turns it off")
        if threshold is not None and not callable(threshold) and not threshold > 0:
            raise ValueError(f"Oscillation: threshold must be above 0, got {threshold}; null freezes nothing")
        if not 0 < momentum < 1:
            raise ValueError(f"Oscillation: momentum must be in (0, 1), got {momentum}; 0.01 as in the paper")
        super().__init__(spec=spec, quantizer=quantizer)
        _require_even_steps(self.inner)
        self.rates, self.momentum = (dampening, threshold), momentum
        self.register_buffer("dampening", torch.tensor(rate_at(dampening, 0.0)))
        self.register_buffer("threshold", torch.tensor(torch.inf if threshold is None else rate_at(threshold, 0.0)))
        self.register_buffer("counted_bits", torch.tensor(0))  # bits of the codes below; 0 before the first step
        self.register_buffer("code", torch.zeros(spec.shape, dtype=torch.int32))
        self.register_buffer("direction", torch.zeros(spec.shape, dtype=torch.int8))
        self.register_buffer("frequency", torch.zeros(spec.shape))
        self.register_buffer("average", torch.zeros(spec.shape))
        self.register_buffer("frozen", torch.zeros(spec.shape, dtype=torch.bool))

    def begin_step_(self, *, progress: float, key: int) -> None:
        dampening, threshold = self.rates
        self.dampening.fill_(rate_at(dampening, progress))
        if threshold is not None:
            self.threshold.fill_(rate_at(threshold, progress))

    def step(self) -> Tensor:
        """The step of the codes, of the state shape."""
        core = innermost(self.inner)
        assert isinstance(core, EvenSteps)
        return core.step()

    def train_forward(self, x: Tensor) -> Tensor:
        if self.rates[0] == 0.0:  # a constant 0, not a schedule
            quantized: Tensor = self.inner(x)
            return quantized
        step = self.spread(self.step(), x)
        distance = distance_to_codes(x, step, self.code_low, self.code_high)
        quantized = self.inner(with_penalty(x, self.penalty_share * self.dampening * distance))
        return quantized

    @torch.no_grad()
    def project(self, weight: Tensor) -> Tensor:
        weight = project(self.inner, weight)
        step = self.spread(self.step(), weight)
        code = clamp_(weight.float() / step, self.code_low, self.code_high).round().to(torch.int32)
        going_on = self.counted_bits == self.bits
        turned = turned_back(code, self.code, self.direction) & ~self.frozen & going_on
        frequency = ema(self.frequency, turned, self.momentum)
        self.frequency.copy_(torch.where(going_on, frequency, 0.0))
        self.average.copy_(torch.where(going_on, ema(self.average, code, self.momentum), code.float()))
        moved = torch.where(going_on, (code - self.code).sign(), 0).to(torch.int8)
        self.direction.copy_(torch.where(moved != 0, moved, torch.where(going_on, self.direction, 0)))
        before = self.frozen & going_on
        now = ~before & going_on & (self.frequency > self.threshold)
        code = torch.where(now, self.average.round().to(torch.int32), torch.where(before, self.code, code))
        self.code.copy_(code)
        self.frozen.copy_(before | now)
        self.counted_bits.copy_(self.bits)
        return torch.where(self.frozen, (code * step).to(weight.dtype), weight)


def oscillating_share(quantizer: Oscillation) -> Tensor:
    """The share of the weights that oscillate, whose frequency is above 0.005: 0-dim, float32."""
    return (quantizer.frequency > OSCILLATES).float().mean()


def _require_even_steps(inner: Quantizer) -> None:
    core = innermost(inner)
    while isinstance(inner, TrainingWrapper):
        inner = inner.inner
    if not isinstance(core, EvenSteps) or isinstance(inner, Wrapper) or getattr(core, "zero_point", None) is not None:
        raise ValueError(
            f"Oscillation: counts codes that are whole steps from zero, and {type(inner).__name__} has none; "
            "take lsq, lsq_plus or affine (symmetric)"
        )
