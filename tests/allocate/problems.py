"""Small problems of a search over bits, with random scores and costs, and the answer by trying everything."""

from itertools import product

import numpy as np

from qtrain.allocate.problem import Problem
from qtrain.spec import Allocation, Choice, CostTable, LayerBits, Scores

WIDTHS = (2, 3, 4, 8)


def random_problem(
    seed: int, *, layers: int = 4, budgets: int = 1, tightness: float = 0.5, pairs: bool = False, tied: bool = False
) -> Problem:
    """Scores fall with the bits and costs rise; each budget lies ``tightness`` of the way from cheapest to dearest."""
    source = np.random.default_rng(seed)
    names = [f"layer{i}" for i in range(layers)]
    options = tuple(LayerBits(w, a) for w in WIDTHS[:3] for a in WIDTHS[1:3])

    def falling() -> dict[str, dict[int, float]]:
        return {name: dict(zip(WIDTHS, sorted(source.exponential(size=4))[::-1], strict=True)) for name in names}

    scores = Scores(falling(), falling(), _pairs(names, source) if pairs else {})
    size = {name: source.uniform(1, 10) for name in names}
    work = {name: source.uniform(1, 10) for name in names}
    costs = {
        "size": CostTable("bytes", 5.0, {n: {bits: size[n] * bits.weight for bits in options} for n in names}),
        "work": CostTable("operations", 0.0, {n: {b: work[n] * b.weight * b.input for b in options} for n in names}),
    }
    limits = {}
    for name in list(costs)[:budgets]:
        low = costs[name].total({n: options[0] for n in names})
        high = costs[name].total({n: options[-1] for n in names})
        limits[name] = low + tightness * (high - low)
    ties = [names[:2]] if tied else []
    return Problem(dict.fromkeys(names, options), costs, limits, scores, ties, seed=seed)


def _pairs(names: list[str], source: np.random.Generator) -> dict[tuple[Choice, Choice], float]:
    sides = [Choice(name, "weight", bits) for name in names for bits in WIDTHS[:3]]
    return {(a, b): source.normal() for a in sides for b in sides if a.layer < b.layer}


def everything(problem: Problem) -> list[Allocation]:
    """Every allocation within the budgets, with tied layers alike."""
    names = list(problem.options)
    found = (dict(zip(names, bits, strict=True)) for bits in product(*problem.options.values()))
    return [a for a in found if problem.fits(a) and all(len({a[name] for name in tie}) == 1 for tie in problem.ties)]


def best_score(problem: Problem) -> float:
    """The least score of all allocations within the budgets."""
    return min(problem.scores.total(allocation) for allocation in everything(problem))
