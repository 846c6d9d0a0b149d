"""A search over bits by a run's settings: what each width costs and hurts, the budgets, and the allocation found.

A run whose ``quantize.bits`` is a search comes through :func:`with_found_bits` before its student is converted. Scores
and allocations are kept on disk under a key of all that they depend on, the weights and the images included. So the
next run with the same question has its answer at once, and all ranks of a job have the same.
"""

import copy
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from qtrain.allocate.base import Search
from qtrain.allocate.from_file import pair_of_bits
from qtrain.allocate.manual import Manual
from qtrain.allocate.pareto import Pareto, Point
from qtrain.allocate.problem import Problem
from qtrain.convert.bank import QuantizerBank, make_bank
from qtrain.convert.fold import fold_in_training_
from qtrain.data.base import VisionData
from qtrain.pipeline.allocation_cache import cached_json, kept_file, plain_scores, scores_of
from qtrain.pipeline.allocation_problem import by_policies, on_target, pinned_bits, problem_of, widths
from qtrain.pipeline.conversion import as_conversion_error, layer_recipe, make_ready_
from qtrain.sensitivity.base import DoneFile
from qtrain.settings.component import Component, built
from qtrain.settings.run_settings import RunSettings
from qtrain.spec import NO_LABEL, Allocation, Batch, LayerBits, LayerNames, Scores
from qtrain.utils.errors import as_config_error
from qtrain.utils.eval_mode import evaluating

log = logging.getLogger(__name__)

LEFT = 0.1
"""What training or learned rounding leaves of a weight's rounding error, roughly; ``results/allocation.csv`` has rows
with and without."""


@dataclass(frozen=True)
class Found:
    """What ``search`` found: the bits, those of the uniform reference, and the problem that it solved.

    ``layers`` are the names that have bits, with those at the ends. ``front`` has the points of a search that finds a
    whole front.
    """

    search: Search
    layers: LayerNames
    allocation: Allocation
    reference: Allocation
    problem: Problem
    front: tuple[Point, ...] = ()

    def predicted(self, allocation: Allocation) -> dict[str, float]:
        """The costs of ``allocation`` by metric, and its ``score``, which is 0 for a search without scores."""
        costs = {name: table.total(allocation) for name, table in self.problem.costs.items()}
        return {**costs, "score": self.problem.scores.total(allocation)}


def is_search(settings: RunSettings) -> bool:
    """Whether the bits of ``settings`` have to be searched for."""
    target = settings.quantize.bits.target
    return isinstance(target, type) and issubclass(target, Search)


def with_found_bits(settings: RunSettings, model: nn.Module, data: VisionData) -> RunSettings:
    """``settings`` with the bits that their search finds for the full-precision ``model``, which is not changed.

    Settings that name their bits come back as they are. Raises ``ConfigError`` for a budget that cannot be met, a
    pattern that fits no layer, and whatever the conversion refuses.
    """
    if not is_search(settings) or not settings.quantize.enabled:
        return settings
    batches = labeled_batches(settings, data, next(model.parameters()).device)
    file = kept_file(
        settings, model, batches, kind="allocation", bits=settings.quantize.bits.plain, left=weight_error(settings)
    )
    allocation = cached_json(
        file,
        lambda: dict(find_bits(settings, copy.deepcopy(model), batches).allocation),
        lambda found: {name: LayerBits(*pair_of_bits(pair)) for name, pair in found.items()},
    )
    log.info("bits by %s: %s", settings.quantize.bits.kind, summary_of(allocation))
    return with_bits(settings, allocation)


def with_bits(settings: RunSettings, allocation: Allocation) -> RunSettings:
    """``settings`` with the bits of ``allocation``; their identity stays that of the search."""
    bits = settings.quantize.bits
    options = {"layers": {name: tuple(pair) for name, pair in allocation.items()}, "weight": 8, "input": 8}
    manual = Component(bits.key, bits.plain, Manual, options)
    return replace(settings, quantize=replace(settings.quantize, bits=manual))


def summary_of(allocation: Allocation) -> str:
    """How many layers have how many bits, in few words."""
    counted: dict[str, int] = {}
    for weight, input in allocation.values():
        name = f"W{weight}A{input}"
        counted[name] = counted.get(name, 0) + 1
    return ", ".join(f"{number} x {name}" for name, number in sorted(counted.items(), key=lambda pair: -pair[1]))


def labeled_batches(settings: RunSettings, data: VisionData, device: torch.device) -> list[Batch]:
    """The training images that scores and measured losses look at, on ``device``."""
    found = data.calibration_batches(settings.allocate.batches)
    return [Batch(*(part.to(device) for part in batch)) for batch in found]


def find_bits(settings: RunSettings, model: nn.Module, batches: Sequence[Batch], *, keep: bool = True) -> Found:
    """Search for bits of ``model``, which is converted in place and of no use afterwards.

    Without ``keep`` scores are neither read from disk nor written there, for choices that the config does not name.
    """
    search: Search = settings.quantize.bits.build()
    score = settings.allocate.score
    scores_file = None
    if keep:
        bits = [search.first, search.last, search.reference.rest]
        scores_file = kept_file(settings, model, batches, kind="scores", score=score.plain, bits=bits)
    example = batches[0].image[:1]
    with as_conversion_error():
        found, operands, _ = make_ready_(settings, model, example)
        layers = found.weighted
        with as_config_error("allocate"):
            pinned = pinned_bits(settings, search, layers)
            around = built(settings.allocate.score.get("reference")) or search.reference
            uniform = on_target(settings, search.reference(layers))
        bank = make_bank(
            model,
            found,
            layer_recipe(settings),
            widths(settings, [*pinned.values(), *uniform.values(), *around(layers).values()]),
            [batch.image for batch in batches],
            built(settings.quantize.policies),
            fixed=operands,
            share=settings.target is not None,
            finish=(lambda model: fold_in_training_(model, example)) if settings.quantize.fold == "training" else None,
        )
    with as_config_error("allocate"):
        pinned = by_policies(bank, pinned)
        reference = by_policies(bank, {**uniform, **pinned})
        # What cannot be met is refused before the scores take their time.
        loss = partial(loss_of, bank, batches)
        problem = problem_of(settings, bank, batches, pinned=pinned, reference=reference, loss=loss)
        if search.needs_scores:
            scores = _scores(settings, bank, batches, scores_file)
            problem = replace(problem, scores=scores.with_weight_error(weight_error(settings)))
        start = time.perf_counter()
        front = tuple(search.front(problem)) if isinstance(search, Pareto) else ()
        allocation = front[-1].allocation if front else search.search(problem)
    log.info("%s took %.1f s", type(search).__name__, time.perf_counter() - start)
    return Found(search, layers, allocation, reference, problem, front)


def weight_error(settings: RunSettings) -> float:
    """The part of a weight's rounding error that a score counts.

    By default that is all of it where a student is calibrated and nothing else, and :data:`LEFT` where it is trained
    or its rounding is learned. An allocation that is asked for by itself is for training.
    """
    if settings.allocate.weight_error is not None:
        return settings.allocate.weight_error
    calibrated = settings.task == "calibrate" and settings.quantize.rounding is None
    return 1.0 if calibrated else LEFT


@torch.no_grad()
def loss_of(bank: QuantizerBank, batches: Sequence[Batch], allocation: Allocation) -> float:
    """Mean cross-entropy in nats of the bank's model at ``allocation`` on the images of ``batches`` that have a label.

    In eval mode. Raises ``ValueError`` where none has one.
    """
    labeled = sum(batch.labeled for batch in batches)
    if not labeled:
        raise ValueError("a loss needs the labels of some of the images, and data.labeled hides those of all here")
    bank.use_(allocation)
    total = 0.0
    with evaluating(bank.model):
        for batch in batches:
            logits = bank.model(batch.image)
            total += float(F.cross_entropy(logits, batch.target, ignore_index=NO_LABEL, reduction="sum"))
    return total / labeled


def _scores(settings: RunSettings, bank: QuantizerBank, batches: Sequence[Batch], file: Path | None) -> Scores:
    """The scores of all choices, kept in ``file``, and their parts beside it: a search that was killed goes on."""

    def computed() -> Scores:
        start = time.perf_counter()
        score = settings.allocate.score.build()
        log.info("scores by %s of %d layers on %d batches", type(score).__name__, len(bank.quantizers), len(batches))
        done = None if file is None else DoneFile(file.with_suffix(".jsonl"))
        scores: Scores = score(bank, batches, seed=settings.seed, done=done)
        log.info("scores by %s took %.0f s", type(score).__name__, time.perf_counter() - start)
        return scores

    return computed() if file is None else cached_json(file, lambda: plain_scores(computed()), scores_of)
