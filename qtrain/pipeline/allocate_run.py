"""A search over bits as a task of its own: the file of the allocation, and how it compares with uniform bits."""

import json
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qtrain.allocate.feasible import Feasible
from qtrain.pipeline.allocate import Found, find_bits, is_search, labeled_batches
from qtrain.pipeline.allocation_cache import plain_scores
from qtrain.pipeline.build_model import build_model
from qtrain.pipeline.load_data import load_data
from qtrain.pipeline.memory_format import settle_memory_format_
from qtrain.pipeline.pretrain import full_precision_weights
from qtrain.pipeline.run_folder import typical_bits
from qtrain.settings.run_files import ALLOCATION, SCORES
from qtrain.settings.run_settings import RunSettings
from qtrain.spec import FULL_PRECISION, Allocation, LayerBits
from qtrain.utils.atomic_write import atomic_write, write_text
from qtrain.utils.errors import ConfigError

log = logging.getLogger(__name__)


CHANCE = 6
"""So many random allocations within the budgets are measured, to see whether the score orders allocations rightly."""


class Measured(NamedTuple):
    """What a score predicted for an allocation, and the loss that was measured for it."""

    name: str
    score: float
    loss: float


@dataclass(frozen=True)
class AllocateRun:
    """What ``task=allocate`` found, and the file that holds it.

    ``losses`` are cross-entropies in nats on the calibration images, of the model in ``full precision``, of the
    ``uniform`` bits and of those ``found``; NaN where no image has a label. ``measured`` compares scores with losses,
    if there are both.
    """

    found: Found
    losses: Mapping[str, float]
    measured: tuple[Measured, ...]
    file: Path


def allocate_bits(settings: RunSettings) -> AllocateRun:
    """Search for bits by ``settings``, measure what was found, and write ``allocation.yaml`` in the run's folder.

    Beside it are the scores, ``scores.json``, if the search read some: a sweep may begin with them.

    Raises ``ConfigError`` where the bits are not a search, where the folder has an allocation that differs and
    ``overwrite`` is false, and for whatever the search refuses.
    """
    if not is_search(settings):
        raise ConfigError(
            "quantize.bits: task=allocate needs a search over bits; choose allocate@quantize.bits=integer_program, "
            "pareto, evolution, ..."
        )
    if not settings.quantize.enabled:
        raise ConfigError("quantize.enabled: is false, so that there are no bits to allocate")
    data = load_data(settings)
    model = build_model(settings.model, data.info, weights=full_precision_weights(settings.model, settings, data))
    settle_memory_format_(settings, model, data)
    batches = labeled_batches(settings, data, next(model.parameters()).device)
    found = find_bits(settings, model, batches)
    in_float = dict.fromkeys(found.layers, LayerBits(FULL_PRECISION, FULL_PRECISION))
    asked = {"full precision": in_float, "uniform": found.reference, "found": found.allocation}
    labeled = any(batch.labeled for batch in batches)
    losses = {name: found.problem.loss(bits) if labeled else math.nan for name, bits in asked.items()}
    measured = _measured(found, losses, seed=settings.seed) if labeled and found.search.needs_scores else ()
    file = Path(settings.run_dir) / ALLOCATION
    _write(file, "".join(f"{line}\n" for line in allocation_lines(settings, found, losses)), settings)
    if found.search.needs_scores:
        write_text(file.with_name(SCORES), json.dumps(plain_scores(found.problem.scores)))
    return AllocateRun(found, losses, measured, file)


def _measured(found: Found, losses: Mapping[str, float], *, seed: int) -> tuple[Measured, ...]:
    """The allocation that was found, the uniform one and random ones within the same budgets."""
    score = found.problem.scores.total
    rows = [
        Measured("found", score(found.allocation), losses["found"]),
        Measured("uniform", score(found.reference), losses["uniform"]),
    ]
    feasible = Feasible(found.problem, np.random.default_rng(seed))
    for _ in range(CHANCE):
        try:
            allocation = feasible.allocation(feasible.draw())
        except ValueError as error:  # the search has found what chance does not
            log.info("no random allocation: %s", error)
            break
        rows.append(Measured("random", score(allocation), found.problem.loss(allocation)))
    return tuple(rows)


def _write(file: Path, text: str, settings: RunSettings) -> None:
    if file.is_file() and file.read_text(encoding="utf-8") != text and not settings.overwrite:
        raise ConfigError(
            f"run_dir: {file} holds another allocation, which somebody may have edited; choose another name=..., or "
            "overwrite=true to replace it"
        )
    with atomic_write(file) as path:
        path.write_text(text, encoding="utf-8")


def allocation_lines(settings: RunSettings, found: Found, losses: Mapping[str, float]) -> Iterator[str]:
    """The lines of ``allocation.yaml``: how the bits were found and what they cost, then the bits layer by layer."""
    names = ", ".join(f"{name} <= {budget:,.6g}" for name, budget in found.problem.budgets.items())
    yield f"# Bits of {settings.model.name} by {settings.quantize.bits.kind}, within {names or 'no budget'}."
    yield "# Edit the layers as you like. Use them: allocate@quantize.bits=from_file quantize.bits.path=THIS_FILE"
    yield f"method: {settings.quantize.bits.kind}"
    yield f"score: {settings.allocate.score.kind if found.search.needs_scores else 'null'}"
    yield f"model: {json.dumps(settings.model.name)}"
    yield f"seed: {settings.seed}"
    yield f"budgets: {_flow(found.problem.budgets)}"
    yield f"predicted: {_flow({**found.predicted(found.allocation), 'loss': losses['found']})}"
    uniform = {**found.predicted(found.reference), "loss": losses["uniform"]}
    yield f"uniform: {_flow(uniform)}   # {_name(found.reference)}"
    yield "layers:   # [weight, input] bits"
    width = max(len(json.dumps(name)) for name in found.allocation)
    for name, bits in found.allocation.items():
        yield f"  {json.dumps(name) + ':':<{width + 1}} [{bits.weight}, {bits.input}]"


def _flow(values: Mapping[str, float]) -> str:
    known = {name: value for name, value in values.items() if not math.isnan(value)}
    return "{" + ", ".join(f"{name}: {value:.10g}" for name, value in known.items()) + "}"


def _name(allocation: Allocation) -> str:
    weight, input = typical_bits(allocation)
    return f"W{weight}A{input}"
