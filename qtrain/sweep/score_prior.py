"""Where a sweep over bits begins: allocations that scores of sensitivity find good, at many sizes.

A search that knows nothing begins with bits by chance, and most of them give one sensitive layer too few. What
``task=allocate`` has learned of the layers tells which bits are worth a try.
"""

import json
from collections.abc import Mapping, Sequence
from math import exp
from pathlib import Path
from random import Random
from typing import NamedTuple

from qtrain.costs.count import LayerCost, count
from qtrain.data.base import VisionData
from qtrain.functional.random import seed_of
from qtrain.pipeline.allocation_cache import DAMAGED_FILE_ERRORS, scores_of
from qtrain.pipeline.build_model import build_model, example_input
from qtrain.settings.run_settings import RunSettings
from qtrain.spec import FULL_PRECISION, Scores
from qtrain.sweep.bit_widths import ROLES, BitWidths
from qtrain.sweep.space import Given, Space
from qtrain.utils.errors import as_config_error


class Width(NamedTuple):
    """A parameter of a knob that is a number of bits: each of ``choices`` has a score, and a bit costs ``share``.

    The shares of all parameters are 1 together.
    """

    knob: str
    part: str
    choices: tuple[int, ...]
    scores: tuple[float, ...]
    share: float


def prior_points(settings: RunSettings, space: Space, data: VisionData) -> list[Given]:
    """The ``sweep.prior.trials`` points to begin with, by the scores in the file ``sweep.prior.scores``.

    They are a function of the file and the seed. Other knobs than those of bits are left to the search. Raises
    ``ConfigError`` for a file that is none, for scores that lack a width, and where no knob turns bits.
    """
    prior = settings.sweep.prior
    if prior.scores is None:
        return []
    with as_config_error("sweep.prior"):
        if prior.trials < 1 or prior.spread < 0:
            raise ValueError(f"trials must be 1 or more, spread 0 or more, got {prior.trials} and {prior.spread:g}")
        scores = read_scores(Path(prior.scores))
        rows = count(build_model(settings.model, data.info), example_input(data.info)).layers
        return draws(widths_of(space, scores, rows), trials=prior.trials, spread=prior.spread, seed=settings.seed)


def read_scores(file: Path) -> Scores:
    """The scores that ``task=allocate`` wrote to ``file``. Raises ``ValueError`` in one line where they are none."""
    try:
        return scores_of(json.loads(file.read_text(encoding="utf-8")))
    except OSError as error:
        raise ValueError(
            f"scores: cannot read {file} ({error.strerror}); give scores.json of a task=allocate"
        ) from error
    except DAMAGED_FILE_ERRORS as error:
        raise ValueError(f"scores: {file} holds no scores; give scores.json of a task=allocate") from error


def widths_of(space: Space, scores: Scores, rows: Sequence[LayerCost]) -> list[Width]:
    """The parameters of ``space`` that are bits. A bit of a weight costs its part of all weights, one of an input its
    part of all multiplications, so that both together cost alike. Raises ``ValueError`` where a score is missing.
    """
    weights, macs = sum(row.weights for row in rows) or 1, sum(row.macs for row in rows) or 1
    cost = {row.name: {"weight": row.weights / weights, "input": row.macs / macs} for row in rows}
    found = []
    for name, knob in space.knobs.items():
        if not isinstance(knob, BitWidths):
            continue
        choices = tuple(bits for bits in knob.choices.values if isinstance(bits, int))
        for part, layers in knob.groups(space.layers).items():
            members = [(layer, role) for layer in layers for role in ROLES[knob.of]]
            rises = tuple(sum(_rise(scores, layer, role, bits) for layer, role in members) for bits in choices)
            share = sum(cost[layer][role] for layer, role in members)
            found.append(Width(name, part, choices, rises, share))
    if not found:
        raise ValueError("scores: no knob of sweep.space turns bits; add +knob@sweep.space.widths=bit_widths")
    if not {*scores.weight, *scores.input} & {*space.layers}:
        raise ValueError("scores: they are of no layer of this model; run task=allocate for it")
    total = sum(width.share for width in found) or 1.0
    return [width._replace(share=width.share / total) for width in found]


def draws(widths: Sequence[Width], *, trials: int, spread: float, seed: int) -> list[Given]:
    """``trials`` points, whose mean bits go evenly from near the fewest choices to near the most, in random order.

    For each, every parameter's scores are multiplied by ``exp(spread z)``, ``z`` of the normal distribution: as a score
    may be wrong by about such a factor. Then the bits are raised, one parameter after the other, where a bit takes most
    off the scores for what it costs, until the mean is reached. With ``spread=0`` chance chooses the order alone.
    """
    least = sum(min(width.choices) * width.share for width in widths)
    most = sum(max(width.choices) * width.share for width in widths)
    order = Random(seed_of(seed, trials)).sample(range(trials), trials)
    points: list[Given] = []
    for number, place in enumerate(order):
        source = Random(seed_of(seed, trials, number))
        factors = [exp(spread * source.gauss(0.0, 1.0)) for _ in widths]
        bits = raised(widths, factors, least + (place + 1) / (trials + 1) * (most - least))
        point: dict[str, dict[str, int]] = {}
        for width, own in zip(widths, bits, strict=True):
            point.setdefault(width.knob, {})[width.part] = own
        points.append({knob: of[""] if set(of) == {""} else of for knob, of in point.items()})
    return points


def raised(widths: Sequence[Width], factors: Sequence[float], mean: float) -> list[int]:
    """Bits of each of ``widths``, at most ``mean`` on average by their shares; the scores count ``factors`` times."""
    at = [0] * len(widths)
    room = mean - sum(width.share * width.choices[0] for width in widths)
    while True:
        steps = [
            (factors[place] * (own.scores[at[place]] - own.scores[to]) / max(cost, 1e-12), place, to, cost)
            for place, own in enumerate(widths)
            for to in range(at[place] + 1, len(own.choices))
            if (cost := own.share * (own.choices[to] - own.choices[at[place]])) <= room + 1e-12
        ]
        if not steps:
            return [width.choices[place] for width, place in zip(widths, at, strict=True)]
        _, place, to, cost = max(steps, key=lambda step: (step[0], -step[2]))
        at[place], room = to, room - cost


def _rise(scores: Scores, layer: str, role: str, bits: int) -> float:
    """The score of one tensor; 0 in full precision, and for a tensor that is scored with another layer."""
    of: Mapping[int, float] = (scores.weight if role == "weight" else scores.input).get(layer, {})
    if of and bits not in of and bits != FULL_PRECISION:
        raise ValueError(
            f"scores: there is none of the {role} of layer {layer!r} at {bits} bits; run task=allocate with {bits} in "
            f"allocate.{role}"
        )
    return of.get(bits, 0.0)
