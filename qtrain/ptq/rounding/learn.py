"""Learning to round: each part of a model learns to give the output of the same part in full precision.

``min_V |z - z^(V)|^2 / noise + strength * mean(1 - |2h(V) - 1|^beta)``, one part after the other, in the order in which
they run. The input of ``z^`` is that in the quantized model, with everything before it rounded; the target ``z`` is the
output in the full-precision model. So a part also corrects errors of the parts before it (arXiv 2004.10568, eq. 25
without the activation; arXiv 2102.05426, §3.2). ``noise`` is the error that nearest rounding of only this part makes in
its output, so that ``strength`` means the same in every layer of every model.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtrain.convert.layers import set_quantization
from qtrain.functional.random import SAMPLE, permutation, seed_of, uniform
from qtrain.ptq.rounding.base import Candidates, all_candidates, write_
from qtrain.ptq.rounding.reconstruction_units import PartRecord, in_order, record_part
from qtrain.ptq.rounding.soft_rounding import (
    Dropped,
    SoftWeight,
    annealed,
    dropping,
    input_parameters,
    mixed,
    standing_in,
    undecided,
)
from qtrain.utils.eval_mode import evaluating

log = logging.getLogger(__name__)

EVALUATED = 128
"""Samples in one forward without learning."""


@final
@dataclass(frozen=True, kw_only=True)
class ReconstructionSettings:
    """How the rounding of a part is learned.

    ``rate`` is Adam's rate for the rounding. ``input_rate`` is that for the parameters of input quantizers, relative to
    each one's size and falling to 0 along a cosine; with 0 they are not learned. ``fisher`` weighs outputs by
    :func:`squared_gradients`. ``drop`` is the probability that a value is not quantized in a step.
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
    fisher: bool = False
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
class PartResult:
    """Mean squared error of one part with nearest rounding and with learned rounding; the better one was kept."""

    name: str
    nearest: float
    learned: float

    @property
    def kept(self) -> bool:
        """Whether the learned rounding was kept."""
        return self.learned < self.nearest


def learn_rounding_(
    student: nn.Module, parts: Sequence[str], images: Sequence[Tensor], *, settings: ReconstructionSettings, seed: int
) -> list[PartResult]:
    """Round the weights of ``parts`` of ``student`` in place, one part after the other, in the order of the forward.

    If the error of a part does not fall, it keeps nearest rounding and its old input quantizers. Raises ``ValueError``
    without images.
    """
    if not images:
        raise ValueError("rounding: has no images to reconstruct; give at least one calibration batch, or take squant")
    choices = all_candidates(student)
    reference = copy.deepcopy(student)
    set_quantization(reference, enabled=False)
    order, reasons = in_order(student, parts, images[0][:2])
    for name, reason in reasons.items():
        log.warning("left at nearest rounding: %s: %s", name, reason)
    results: list[PartResult] = []
    for name in order:
        within = {key: chosen for key, chosen in choices.items() if f"{key}.".startswith(f"{name}.")}
        if not within:
            continue
        quantized, exact = record_part(student, name, images), record_part(reference, name, images)
        key = seed_of(seed, len(results))
        weight = squared_gradients(reference, name, images, seed=key) if settings.fisher else None
        task = Reconstruction(student.get_submodule(name), quantized, exact, weight)
        with evaluating(task.part):
            result = PartResult(name, *_learn_(task, list(within.values()), settings, key))
        found = "learned" if result.kept else "left at nearest rounding"
        log.info("%s: %s: squared error %.3g, learned %.3g", name, found, result.nearest, result.learned)
        results.append(result)
    return results


@torch.enable_grad()
def squared_gradients(model: nn.Module, name: str, images: Sequence[Tensor], *, seed: int) -> Tensor:
    """Squared gradient of each output of the part ``name`` of ``model``, (N, ...), divided by their mean.

    The loss is the cross-entropy with classes drawn from the model's own probabilities, so that no labels are needed
    and the mean of the squares is the diagonal of Fisher's information (arXiv 2102.05426, eq. 10). Draws are a function
    of ``seed`` and the image's place.
    """
    outputs: list[Tensor] = []
    squares = []

    def begin_here(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        outputs[:] = [output.detach().requires_grad_()]
        return outputs[0].clone()  # what follows may work in place

    handle = model.get_submodule(name).register_forward_hook(begin_here)
    try:
        with evaluating(model):
            for number, batch in enumerate(images):
                logits = model(batch)
                places = torch.arange(len(batch), device=batch.device)
                draws = uniform(seed=seed, epoch=number, index=places, stream=SAMPLE, count=1)
                reached = logits.detach().softmax(dim=1).cumsum(dim=1) < draws
                classes = reached.sum(dim=1).clamp(max=logits.shape[1] - 1)
                loss = F.cross_entropy(logits, classes, reduction="sum")
                squares.append(torch.autograd.grad(loss, outputs)[0].square())
    finally:
        handle.remove()
    square = torch.cat(squares)
    return square / square.mean().clamp(min=torch.finfo(square.dtype).tiny)


@final
@dataclass(frozen=True, eq=False)
class Reconstruction:
    """One part of a model: its inputs, its target outputs, and the weight of each output in the error."""

    part: nn.Module
    quantized: PartRecord
    exact: PartRecord
    weight: Tensor | None

    def output(self, x: Tensor) -> Tensor:
        """The part's current output for ``x``."""
        args, kwargs = self.quantized.options
        output: Tensor = self.part(x, *args, **kwargs)
        return output

    @torch.no_grad()
    def outputs(self) -> Tensor:
        """The part's current outputs for all inputs."""
        return torch.cat([self.output(x) for x in self.quantized.inputs.split(EVALUATED)])

    def distance(self, output: Tensor, target: Tensor, samples: Tensor | None = None) -> Tensor:
        """Weighted mean squared difference of ``output`` and ``target``, of all samples or of ``samples``."""
        square = (output - target).square()
        if self.weight is not None:
            square = square * (self.weight if samples is None else self.weight[samples])
        return square.mean()

    def error(self) -> float:
        """The distance of the part's current outputs from the target."""
        return float(self.distance(self.outputs(), self.exact.outputs))

    def noise(self, choices: Sequence[Candidates]) -> float:
        """The distance between the part's outputs with and without rounding of these weights."""
        rounded = self.outputs()
        quantizers = [q for chosen in choices if (q := chosen.layer.weight_quantizer) is not None]
        for quantizer in quantizers:
            quantizer.enabled = False
        try:
            return float(self.distance(self.outputs(), rounded))
        finally:
            for quantizer in quantizers:
                quantizer.enabled = True


def _learn_(
    task: Reconstruction, choices: Sequence[Candidates], settings: ReconstructionSettings, seed: int
) -> tuple[float, float]:
    """Learn the rounding of one part, keep it if it is better, and return the error before and after learning."""
    nearest, noise = task.error(), task.noise(choices)
    if not noise > 0:  # the weights lie on the grid already
        return nearest, nearest
    before = {key: tensor.clone() for key, tensor in task.part.state_dict().items()}
    softs = [SoftWeight(chosen) for chosen in choices]
    with standing_in(choices, softs), dropping(task.part, settings.drop) as dropped:
        _descend(task, softs, dropped, settings, noise, seed)
    for chosen, soft in zip(choices, softs, strict=True):
        write_(chosen, soft.settled())
    learned = task.error()
    if not learned < nearest:
        task.part.load_state_dict(before)
    return nearest, learned


@torch.enable_grad()
def _descend(
    task: Reconstruction,
    softs: Sequence[SoftWeight],
    dropped: Sequence[Dropped],
    settings: ReconstructionSettings,
    noise: float,
    seed: int,
) -> None:
    variables: list[nn.Parameter] = [soft.variable for soft in softs]
    learned = input_parameters(task.part) if settings.input_rate > 0 else []
    sizes = [float(p.detach().square().mean().sqrt()) for p in learned]
    groups: list[dict[str, Any]] = [{"params": variables, "lr": settings.rate}, *({"params": [p]} for p in learned)]
    optimizer = torch.optim.Adam(groups)
    inputs, exact = task.quantized.inputs, task.exact
    size = min(settings.batch_size, len(inputs))
    for step in range(settings.iterations):
        progress = step / settings.iterations
        falling = (1 + math.cos(math.pi * progress)) / 2
        for group, own in zip(optimizer.param_groups[1:], sizes, strict=True):
            group["lr"] = settings.input_rate * own * falling
        samples = _minibatch(seed, step, len(inputs), size).to(inputs.device)
        x = inputs[samples]
        if settings.drop > 0:
            for place, module in enumerate(dropped, start=1):
                module.seed = seed_of(seed, step, place)
            x = mixed(exact.inputs[samples], x, drop=settings.drop, seed=seed_of(seed, step, 0))
        loss = task.distance(task.output(x), exact.outputs[samples], samples) / noise
        beta = annealed(progress, start=settings.beta_start, end=settings.beta_end, warmup=settings.warmup)
        if beta is not None and settings.strength > 0:
            loss = loss + settings.strength * undecided(torch.cat([soft.share() for soft in softs]), beta).mean()
        for p, gradient in zip([*variables, *learned], torch.autograd.grad(loss, [*variables, *learned]), strict=True):
            p.grad = gradient
        optimizer.step()
    for p in learned:
        p.grad = None


def _minibatch(seed: int, step: int, count: int, size: int) -> Tensor:
    """Numbers of the samples of step ``step``: all ``count`` in a random order, then again in another order."""
    each = count // size
    return permutation(seed=seed, epoch=step // each, n=count)[(step % each) * size :][:size]
