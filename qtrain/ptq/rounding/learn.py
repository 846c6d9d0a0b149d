"""Learning to round: each part of a model learns to give the output of the same part in full precision.

``min_V |z - z^(V)|^2 / noise + strength * mean(1 - |2h(V) - 1|^beta)``, one part after the other, in the order in which
they run. The input of ``z^`` is that in the quantized model, with everything before it rounded; the target ``z`` is the
output in the full-precision model. So a part also corrects errors of the parts before it (arXiv 2004.10568, eq. 25
without the activation; arXiv 2102.05426, §3.2). ``noise`` is the error that nearest rounding of only this part makes in
its output, so that ``strength`` means the same in every layer of every model.
"""

import copy
import logging
import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtrain.convert.layers import set_quantization, switched_off
from qtrain.functional.random import SAMPLE, permutation, seed_of, uniform
from qtrain.ptq.rounding.base import Candidates, Rounding, all_candidates, write_
from qtrain.ptq.rounding.reconstruction_units import PartRecord, blocks_of, in_order, record_part, used_elsewhere
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
from qtrain.utils.checks import check_range
from qtrain.utils.eval_mode import evaluating
from qtrain.utils.progress import tracked

log = logging.getLogger(__name__)

EVALUATED = 128
"""Samples in one forward without learning."""


@dataclass(frozen=True, kw_only=True)
class LearnedRounding(Rounding):
    """Base of the ways that learn the rounding of one part of a model after the other; subclasses are final.

    There are ``iterations`` of Adam at ``rate`` with minibatches of ``batch_size`` images. After the share ``warmup``
    of them, the variables are driven to 0 and 1 with ``strength``, while beta falls from ``beta_start`` to ``beta_end``
    (arXiv 2004.10568, eq. 24).

    ``input_rate`` is the rate for the parameters of input quantizers, relative to each one's size and falling to 0
    along a cosine; with 0 they are not learned. ``fisher`` weighs outputs by :func:`squared_gradients`. ``drop`` is the
    probability that a value is not quantized in a step. These three are options of some subclasses.
    """

    iterations: int = 300
    batch_size: int = 32
    rate: float = 0.1
    strength: float = 0.1
    warmup: float = 0.2
    beta_start: float = 20.0
    beta_end: float = 2.0
    input_rate, fisher, drop = 0.0, False, 0.0

    def __post_init__(self) -> None:
        owner = type(self).__name__
        check_range(owner, "[1, inf)", iterations=self.iterations, batch_size=self.batch_size)
        check_range(owner, "(0, inf)", rate=self.rate, hint="0.01 is usual")
        check_range(owner, "[0, inf)", strength=self.strength, input_rate=self.input_rate, hint="0 is without")
        if not self.beta_start >= self.beta_end > 0:
            raise ValueError(
                f"{owner}: beta falls from beta_start to beta_end, which is above 0; "
                f"got {self.beta_start} and {self.beta_end}; the paper's are 20 and 2"
            )
        check_range(owner, "[0, 1)", warmup=self.warmup, drop=self.drop)

    @abstractmethod
    def parts(self, student: nn.Module) -> list[str]:
        """The names of the parts of ``student`` that are rounded one after the other."""

    @final
    def __call__(self, student: nn.Module, images: Sequence[Tensor], *, seed: int) -> None:
        learn_rounding_(student, self.parts(student), images, settings=self, seed=seed)


@dataclass(frozen=True, kw_only=True)
class BlockRounding(LearnedRounding):
    """Base of the ways that round the weights of a block together; ``blocks`` are patterns of module names.

    Without any, the blocks are found by :func:`~qtrain.ptq.rounding.reconstruction_units.blocks_of`. The parameters of
    input quantizers, LSQ's step for instance, are learned with the rounding (arXiv 2102.05426, §3.4).
    """

    blocks: Sequence[str] | None = None
    input_rate: float = 0.001

    @final
    def parts(self, student: nn.Module) -> list[str]:
        return blocks_of(student, self.blocks or ())


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
    student: nn.Module, parts: Sequence[str], images: Sequence[Tensor], *, settings: LearnedRounding, seed: int
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
    for name in tracked(order, total=len(order), title="learned rounding", unit="parts"):
        elsewhere = used_elsewhere(student, name)
        within = {key: chosen for key, chosen in choices.items() if f"{key}.".startswith(f"{name}.")}
        for layer in [layer for layer, chosen in within.items() if chosen.layer in elsewhere]:
            other = elsewhere[within.pop(layer).layer]
            log.warning("left at nearest rounding: %s: it is also %s, outside of the part %s", layer, other, name)
        if not within:
            continue
        quantized, exact = record_part(student, name, images), record_part(reference, name, images)
        key = seed_of(seed, len(results))
        weight = squared_gradients(reference, name, images, seed=key) if settings.fisher else None
        task = Reconstruction(student.get_submodule(name), quantized, exact, weight, [*elsewhere])
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
    of ``seed`` and the image's place. Raises ``ValueError`` for outputs of ``model`` that are not (N, classes).
    """
    outputs: list[Tensor] = []
    squares = []

    def begin_here(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        outputs[:] = [output.detach().requires_grad_()]
        return outputs[0].clone()  # what follows may work in place

    with model.get_submodule(name).register_forward_hook(begin_here), evaluating(model):
        for number, batch in enumerate(images):
            logits = model(batch)
            if not isinstance(logits, Tensor) or logits.ndim != 2:
                raise ValueError("fisher: needs outputs (N, classes) of the model; take fisher=false")
            places = torch.arange(len(batch), device=batch.device)
            draws = uniform(seed=seed, epoch=number, index=places, stream=SAMPLE, count=1)
            reached = logits.detach().softmax(dim=1).cumsum(dim=1) < draws
            classes = reached.sum(dim=1).clamp(max=logits.shape[1] - 1)
            loss = F.cross_entropy(logits, classes, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, outputs, materialize_grads=True)  # 0 where they do not reach it
            squares.append(gradient.square())
    square = torch.cat(squares)
    return square / square.mean().clamp(min=torch.finfo(square.dtype).tiny)


@final
@dataclass(frozen=True, eq=False)
class Reconstruction:
    """One part of a model: its inputs, its target outputs, and the weight of each output in the error.

    ``elsewhere`` are its modules that belong to other parts too, and stay as they are.
    """

    part: nn.Module
    quantized: PartRecord
    exact: PartRecord
    weight: Tensor | None
    elsewhere: Sequence[nn.Module] = ()

    def output(self, x: Tensor) -> Tensor:
        """The part's current output for ``x``."""
        args, kwargs = self.quantized.options
        output: Tensor = self.part(x, *args, **kwargs)
        return output

    @torch.no_grad()
    def outputs(self) -> Tensor:
        """The part's current outputs for all inputs, which stay as they are although the part may work in place."""
        return torch.cat([self.output(x.clone()) for x in self.quantized.inputs.split(EVALUATED)])

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
        with switched_off(chosen.layer.weight_quantizer for chosen in choices):
            return float(self.distance(self.outputs(), rounded))


def _learn_(
    task: Reconstruction, choices: Sequence[Candidates], settings: LearnedRounding, seed: int
) -> tuple[float, float]:
    """Learn the rounding of one part, keep it if it is better, and return the error before and after learning."""
    nearest, noise = task.error(), task.noise(choices)
    if not noise > 0:  # the weights lie on the grid already
        return nearest, nearest
    before = {key: tensor.clone() for key, tensor in task.part.state_dict().items()}
    softs = [SoftWeight(chosen) for chosen in choices]
    # Before quantizers are replaced, by which those of other parts are known.
    learned_inputs = input_parameters(task.part, besides=task.elsewhere) if settings.input_rate > 0 else []
    with standing_in(choices, softs), dropping(task.part, settings.drop) as dropped:
        _descend(task, softs, learned_inputs, dropped, settings, noise, seed)
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
    learned: Sequence[nn.Parameter],
    dropped: Sequence[Dropped],
    settings: LearnedRounding,
    noise: float,
    seed: int,
) -> None:
    variables: list[nn.Parameter] = [soft.variable for soft in softs]
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
        # A layer that the part does not call has none, and stays as it is.
        gradients = torch.autograd.grad(loss, [*variables, *learned], allow_unused=True)
        for p, gradient in zip([*variables, *learned], gradients, strict=True):
            p.grad = gradient
        optimizer.step()
    for p in learned:
        p.grad = None


def _minibatch(seed: int, step: int, count: int, size: int) -> Tensor:
    """Numbers of the samples of step ``step``: all ``count`` in a random order, then again in another order."""
    each = count // size
    return permutation(seed=seed, epoch=step // each, n=count)[(step % each) * size :][:size]
