"""Small problems of a search over bits, with random scores and costs, and the answer by trying everything."""

from dataclasses import replace
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
    if budgets > 2:  # drawn last, so that problems of fewer budgets stay what they were
        moved = {name: source.uniform(1, 10) for name in names}
        energy = {n: {b: moved[n] * (b.weight + 3 * b.input) for b in options} for n in names}
        costs["energy"] = CostTable("pJ", 2.0, energy)
    limits = {}
    for name in list(costs)[:budgets]:
        low = costs[name].total({n: options[0] for n in names})
        high = costs[name].total({n: options[-1] for n in names})
        limits[name] = low + tightness * (high - low)
    ties = [names[:2]] if tied else []
    return Problem(dict.fromkeys(names, options), costs, limits, scores, ties, seed=seed)


def with_equal_scores(problem: Problem) -> Problem:
    """``problem`` where the first layer's bits, and the inputs' bits of the third, change no score."""
    weight, input = dict(problem.scores.weight), dict(problem.scores.input)
    weight["layer0"] = input["layer0"] = dict.fromkeys(WIDTHS, 0.25)
    input["layer2"] = dict.fromkeys(WIDTHS, 0.0)
    pairs = {pair: value for pair, value in problem.scores.pairs.items() if pair[0].layer != "layer0"}
    return replace(problem, scores=Scores(weight, input, pairs))


def scaled(problem: Problem, factor: float) -> Problem:
    """``problem`` with all scores ``factor`` times as large, pairs too."""
    sides = [
        {layer: {bits: factor * value for bits, value in of.items()} for layer, of in side.items()}
        for side in (problem.scores.weight, problem.scores.input)
    ]
    pairs = {pair: factor * value for pair, value in problem.scores.pairs.items()}
    return replace(problem, scores=Scores(*sides, pairs))


def slow_few_bits(*, layers: int = 4, budget: float) -> Problem:
    """4 bits take longer than 8, as where a runtime unpacks them first, and they are worse as well."""
    few, many = LayerBits(4, 4), LayerBits(8, 8)
    names = [f"layer{i}" for i in range(layers)]
    times = CostTable("us", 0.0, {name: {few: 12.0, many: 10.0} for name in names})
    rises = {name: {4: 1.0, 8: 0.1} for name in names}
    options = dict.fromkeys(names, (few, many))
    return Problem(options, {"latency": times}, {"latency": budget}, Scores(rises, rises), loss=lambda _: 1.0)


def uneven_kernels(seed: int) -> Problem | None:
    """Eight layers whose size falls with the bits, and whose time does as chance has it, layer by layer.

    Both budgets are a tenth below what some allocation costs; ``None`` where one of them alone cannot be met.
    """
    source = np.random.default_rng(seed)
    names, options = [f"layer{i}" for i in range(8)], tuple(LayerBits(w, a) for w in (2, 4, 8) for a in (4, 8))
    sizes, times = {}, {}
    for name in names:
        size = source.lognormal(0, 1.5)
        slow = dict(zip((2, 4, 8), source.permutation([1.0, 1.3, 2.0]) * source.uniform(0.5, 2), strict=True))
        sizes[name] = {bits: size * bits.weight for bits in options}
        times[name] = {bits: float(slow[bits.weight]) for bits in options}
    costs = {"size": CostTable("bytes", 0.0, sizes), "latency": CostTable("us", 0.0, times)}
    some = {name: options[int(source.integers(len(options)))] for name in names}
    rises = {name: {bits: 4.0**-bits for bits in (2, 4, 8)} for name in names}
    limits = {metric: 0.9 * costs[metric].total(some) for metric in costs}
    try:
        return Problem(dict.fromkeys(names, options), costs, limits, Scores(rises, rises), loss=lambda _: 1.0)
    except ValueError:
        return None


def _pairs(names: list[str], source: np.random.Generator) -> dict[tuple[Choice, Choice], float]:
    sides = [Choice(name, "weight", bits) for name in names for bits in WIDTHS[:3]]
    return {(a, b): source.normal() for a in sides for b in sides if a.layer < b.layer}


def everything(problem: Problem) -> list[Allocation]:
    """Every allocation within the budgets, with tied layers alike."""
    names = list(problem.options)
    found = (dict(zip(names, bits, strict=True)) for bits in product(*problem.options.values()))
    return [a for a in found if problem.fits(a) and all(len({a[name] for name in tie}) == 1 for tie in problem.ties)]


def most_bits(problem: Problem) -> int:
    """The most bits of all allocations within the budgets that have the least score."""
    best = best_score(problem)
    return max(bits_of(a) for a in everything(problem) if problem.scores.total(a) <= best + 1e-12)


def bits_of(allocation: Allocation) -> int:
    """The bits of all weights and inputs."""
    return sum(sum(bits) for bits in allocation.values())


def best_score(problem: Problem) -> float:
    """The least score of all allocations within the budgets."""
    return min(problem.scores.total(allocation) for allocation in everything(problem))
