"""Learning to round: each part of a model gives back what the full-precision model's same part gives.

``min_V |z - z^(V)|^2 / noise + strength * mean(1 - |2h(V) - 1|^beta)``, one part after the other, in the order in which
they run. The input of ``z^`` is that of the quantised model with everything before it rounded, the target ``z`` that of
the full-precision model, so that a part also makes up for what came before it (arXiv 2004.10568, eq. 25 without the
activation; arXiv 2102.05426, §3.2). ``noise`` is what nearest rounding of this part alone does to its output, so that
``strength`` means the same in every layer of every model.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from qtrain.convert.layers import quant_layers, set_quantization
from qtrain.convert.rounding.base import Candidates, all_candidates, write_
from qtrain.convert.rounding.stand_ins import Dropped, SoftWeight, annealed, mixed, undecided
from qtrain.convert.rounding.units import Seen, in_order, seen_of
from qtrain.functional.random import permutation, seed_of
from qtrain.modes import evaluating
from qtrain.quantizers.hooks import ScalesOutput

log = logging.getLogger(__name__)

EVALUATED = 128
"""Samples in one forward where nothing is learned."""


@final
@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a part is learned; ``input_rate`` 0 leaves the input quantizers alone.

    ``rate`` is Adam's for the rounding, ``input_rate`` relative to each parameter's own size for those of the input
    quantizers, falling to 0 along a cosine. ``drop`` is the probability that a value is not quantised, for one step.
    """

    owner: str
    iterations: int
    batch_size: int
    rate: float
    strength: float
    beta_start: float
    beta_end: float
    warmup: float
    input_rate: float = 0.0
    drop: float = 0.0

    def __post_init__(self) -> None:
        for name in ("iterations", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{self.owner}: {name} must be at least 1, got {getattr(self, name)}")
        if not self.rate > 0:
            raise ValueError(f"{self.owner}: rate must be above 0, got {self.rate}; 0.01 is usual")
        for name in ("strength", "input_rate"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{self.owner}: {name} must be at least 0, got {getattr(self, name)}; 0 is without")
        if not self.beta_start >= self.beta_end > 0:
            raise ValueError(
                f"{self.owner}: beta falls from beta_start to beta_end, which is above 0; "
                f"got {self.beta_start} and {self.beta_end}; the paper's are 20 and 2"
            )
        for name in ("warmup", "drop"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{self.owner}: {name} must be in [0, 1), got {getattr(self, name)}")


@final
@dataclass(frozen=True)
class Outcome:
    """What became of one part: its mean squared error at nearest rounding, and as learned; the smaller was kept."""

    name: str
    nearest: float
    learned: float

    @property
    def kept(self) -> bool:
        """Whether the learned rounding stays."""
        return self.learned < self.nearest


def learn_rounding_(
    student: nn.Module, parts: Sequence[str], images: Sequence[Tensor], *, recipe: Recipe, seed: int
) -> list[Outcome]:
    """Round the weights of ``parts`` of ``student`` in place, one part after the other, in the order of the forward.

    A part whose error would not fall keeps nearest rounding, and its input quantizers as they were. Raises
    ``ValueError`` without images.
    """
    if not images:
        raise ValueError("rounding: has no images to reconstruct; give at least one calibration batch, or take squant")
    choices = all_candidates(student)
    reference = copy.deepcopy(student)
    set_quantization(reference, enabled=False)
    order, reasons = in_order(student, parts, images[0][:2])
    for name, reason in reasons.items():
        log.warning("left at nearest rounding: %s: %s", name, reason)
    outcomes: list[Outcome] = []
    for name in order:
        within = {key: chosen for key, chosen in choices.items() if f"{key}.".startswith(f"{name}.")}
        if not within:
            continue
        quantised, exact = seen_of(student, name, images), seen_of(reference, name, images)
        part = student.get_submodule(name)
        with evaluating(part):
            outcome = _learn_(name, part, list(within.values()), quantised, exact, recipe, seed_of(seed, len(outcomes)))
        found = "learned" if outcome.kept else "left at nearest rounding"
        log.info("%s: %s: squared error %.3g, learned %.3g", name, found, outcome.nearest, outcome.learned)
        outcomes.append(outcome)
    return outcomes


def _learn_(
    name: str, part: nn.Module, choices: Sequence[Candidates], quantised: Seen, exact: Seen, recipe: Recipe, seed: int
) -> Outcome:
    before = {key: tensor.clone() for key, tensor in part.state_dict().items()}
    nearest = _error(part, quantised, exact.outputs)
    noise = _noise(part, choices, quantised)
    if not noise > 0:  # the weights are on the grid as they are
        return Outcome(name, nearest, nearest)
    softs = [SoftWeight(chosen) for chosen in choices]
    with _standing_in(choices, softs):
        _descend(part, softs, quantised, exact, recipe, noise, seed)
    for chosen, soft in zip(choices, softs, strict=True):
        write_(chosen, soft.settled())
    outcome = Outcome(name, nearest, _error(part, quantised, exact.outputs))
    if not outcome.kept:
        part.load_state_dict(before)
    return outcome


def _descend(
    part: nn.Module,
    softs: Sequence[SoftWeight],
    quantised: Seen,
    exact: Seen,
    recipe: Recipe,
    noise: float,
    seed: int,
) -> None:
    """The descent itself, by Adam; ``softs`` and the parameters of input quantizers end where it took them."""
    learned = _input_parameters(part) if recipe.input_rate > 0 else []
    groups = [{"params": [soft.variable for soft in softs], "lr": recipe.rate}]
    groups += [{"params": [p], "lr": recipe.input_rate * float(p.detach().square().mean().sqrt())} for p in learned]
    optimizer = torch.optim.Adam(groups)
    rates = [group["lr"] for group in optimizer.param_groups]
    variables = [p for group in optimizer.param_groups for p in group["params"]]
    count = len(quantised.inputs)
    size = min(recipe.batch_size, count)
    args, kwargs = quantised.options
    key = torch.zeros((), dtype=torch.int64, device=quantised.inputs.device)
    with _dropping(part, recipe.drop) as dropped:
        for step in range(recipe.iterations):
            chosen = _minibatch(seed, step, count, size).to(quantised.inputs.device)
            x, z = quantised.inputs[chosen], exact.outputs[chosen]
            if recipe.drop > 0:
                for place, module in enumerate(dropped, start=1):
                    module.key.fill_(seed_of(seed, step, place))
                x = mixed(exact.inputs[chosen], x, drop=recipe.drop, key=key.fill_(seed_of(seed, step, 0)))
            loss = (part(x, *args, **kwargs) - z).square().mean() / noise
            progress = step / recipe.iterations
            beta = annealed(progress, start=recipe.beta_start, end=recipe.beta_end, warmup=recipe.warmup)
            if beta is not None:
                loss = loss + recipe.strength * undecided(torch.cat([soft.share() for soft in softs]), beta).mean()
            for p, gradient in zip(variables, torch.autograd.grad(loss, variables), strict=True):
                p.grad = gradient
            falling = (1 + math.cos(math.pi * progress)) / 2
            for group, rate in zip(optimizer.param_groups[1:], rates[1:], strict=True):
                group["lr"] = rate * falling
            optimizer.step()
    optimizer.zero_grad()


def _minibatch(seed: int, step: int, count: int, size: int) -> Tensor:
    """Which of ``count`` samples step ``step`` looks at: every one once, in a new order, before any a second time."""
    each = count // size
    return permutation(seed=seed, epoch=step // each, n=count)[(step % each) * size :][:size]


def _input_parameters(part: nn.Module) -> list[nn.Parameter]:
    quantizers = [layer.input_quantizer for layer in quant_layers(part).values()]
    return [p for quantizer in quantizers if quantizer is not None for p in quantizer.parameters() if p.requires_grad]


@torch.no_grad()
def _error(part: nn.Module, quantised: Seen, target: Tensor) -> float:
    """Mean squared error of the part's output, over all samples."""
    return float((_output(part, quantised) - target).double().square().mean())


@torch.no_grad()
def _noise(part: nn.Module, choices: Sequence[Candidates], quantised: Seen) -> float:
    """Mean squared difference that the rounding of this part's weights makes, all else as it is."""
    rounded = _output(part, quantised)
    quantizers = [chosen.layer.weight_quantizer for chosen in choices]
    for quantizer in quantizers:
        assert quantizer is not None
        quantizer.enabled = False
    try:
        return float((_output(part, quantised) - rounded).double().square().mean())
    finally:
        for quantizer in quantizers:
            assert quantizer is not None
            quantizer.enabled = True


def _output(part: nn.Module, quantised: Seen) -> Tensor:
    args, kwargs = quantised.options
    return torch.cat([part(x, *args, **kwargs) for x in quantised.inputs.split(EVALUATED)])


@contextmanager
def _standing_in(choices: Sequence[Candidates], softs: Sequence[SoftWeight]) -> Iterator[None]:
    """Inside, soft weights are in the places of the layers' weight quantizers."""
    quantizers = [chosen.layer.weight_quantizer for chosen in choices]
    try:
        for chosen, soft in zip(choices, softs, strict=True):
            chosen.layer.weight_quantizer = soft  # type: ignore[assignment] # for a while
        yield
    finally:
        for chosen, quantizer in zip(choices, quantizers, strict=True):
            chosen.layer.weight_quantizer = quantizer


@contextmanager
def _dropping(part: nn.Module, drop: float) -> Iterator[list[Dropped]]:
    """Inside, input quantizers leave out each value with probability ``drop``; yields what does that."""
    layers = [
        layer
        for layer in quant_layers(part).values()
        if layer.input_quantizer is not None and not isinstance(layer.input_quantizer, ScalesOutput)
    ]
    quantizers = [layer.input_quantizer for layer in layers]
    dropped = [Dropped(quantizer, drop=drop) for quantizer in quantizers if quantizer is not None]
    try:
        if drop > 0:
            for layer, module in zip(layers, dropped, strict=True):
                layer.input_quantizer = module  # type: ignore[assignment] # for a while
        yield dropped
    finally:
        for layer, quantizer in zip(layers, quantizers, strict=True):
            layer.input_quantizer = quantizer
