"""The integer program against trying everything, its budgets, and what it says where nothing fits."""

import math
from dataclasses import replace

import numpy as np
import pytest

from qtrain.allocate.integer_program import IntegerProgram, _without_dominated
from qtrain.allocate.problem import Problem
from qtrain.spec import CostTable, LayerBits, Scores
from tests.allocate.problems import (
    best_score,
    bits_of,
    everything,
    most_bits,
    random_problem,
    scaled,
    with_equal_scores,
)

EXACT = IntegerProgram(gap=0.0)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("budgets", "tied"), [(0, False), (1, False), (2, False), (2, True)])
def test_it_finds_the_least_score_that_trying_everything_finds(seed: int, budgets: int, tied: bool) -> None:
    problem = random_problem(seed, budgets=budgets, tied=tied)
    allocation = EXACT.search(problem)
    assert problem.fits(allocation)
    assert problem.scores.total(allocation) == pytest.approx(best_score(problem), rel=1e-9)
    assert list(allocation) == list(problem.options)
    if tied:
        assert allocation["layer0"] == allocation["layer1"]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("layers", range(5, 9))
def test_of_five_to_eight_layers_too_it_finds_the_least_score(layers: int, seed: int) -> None:
    """With three options each there are 6,561 allocations of eight layers."""
    problem = random_problem(seed, layers=layers, budgets=2)
    options = (LayerBits(2, 3), LayerBits(3, 4), LayerBits(4, 3))
    problem = replace(problem, options=dict.fromkeys(problem.options, options))
    assert problem.scores.total(EXACT.search(problem)) == pytest.approx(best_score(problem), rel=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_with_pairs_it_finds_the_least_score_that_trying_everything_finds(seed: int) -> None:
    problem = random_problem(seed, layers=3, budgets=1, pairs=True)
    allocation = EXACT.search(problem)
    assert problem.scores.total(allocation) == pytest.approx(best_score(problem), abs=1e-9)
    alone = Problem(
        problem.options, problem.costs, problem.budgets, Scores(problem.scores.weight, problem.scores.input)
    )
    assert any(
        problem.scores.total(a) < problem.scores.total(EXACT.search(alone)) - 1e-6 for a in everything(problem)
    ), "the pairs of this problem matter"


@pytest.mark.parametrize("factor", [1e6, 1e-3, 1e-5, 1e-7, 1e-9, 1e-12])
@pytest.mark.parametrize(("seed", "pairs"), [(0, False), (1, False), (2, False), (0, True), (1, True)])
def test_the_size_of_scores_does_not_matter(factor: float, seed: int, pairs: bool) -> None:
    """The solver's tolerances are absolute: scores of 1e-6 nats, as of a trained network at 8 bits, were all alike."""
    problem = scaled(random_problem(seed, layers=3 if pairs else 4, budgets=2 - pairs, pairs=pairs), factor)
    assert problem.scores.total(EXACT.search(problem)) == pytest.approx(best_score(problem), rel=1e-6)


def test_one_terrible_option_does_not_drown_the_others() -> None:
    """The first layer at 2 bits costs a million times what all others cost together."""
    problem = scaled(random_problem(3, layers=4), 1e-6)
    terrible = {**problem.scores.weight, "layer0": {**problem.scores.weight["layer0"], 2: 1e3}}
    problem = replace(problem, scores=Scores(terrible, problem.scores.input))
    assert problem.scores.total(EXACT.search(problem)) == pytest.approx(best_score(problem), rel=1e-6)


@pytest.mark.parametrize("more", [1e-9, 1e-7, 9e-7, 2e-6])
def test_a_budget_that_only_the_cheapest_meets_is_met(more: float) -> None:
    """The other option costs less than the solver's tolerance more."""
    few, many = LayerBits(2, 2), LayerBits(4, 4)
    table = CostTable("us", 0.0, {"a": {few: 1.0, many: 1.0 + more}, "b": {few: 1.0, many: 2.0}})
    scores = Scores({name: {2: 1.0, 4: 0.1} for name in "ab"}, {})
    problem = Problem(dict.fromkeys("ab", (few, many)), {"time": table}, {"time": 2.0}, scores)
    assert EXACT.search(problem) == dict.fromkeys("ab", few)


def test_a_solver_that_is_stopped_says_so(caplog: pytest.LogCaptureFixture) -> None:
    problem = random_problem(0, layers=8, budgets=2)
    with pytest.raises(ValueError, match=r"found no allocation in 1e-09 s; relax one, or raise its time_limit_s"):
        IntegerProgram(time_limit_s=1e-9).search(problem)
    assert "stopped after 1e-09 s" in caplog.text


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("budgets", "tied", "pairs"), [(0, False, False), (2, False, False), (2, True, False), (1, False, True)]
)
def test_of_equal_scores_it_takes_the_most_bits_that_fit(seed: int, budgets: int, tied: bool, pairs: bool) -> None:
    problem = with_equal_scores(random_problem(seed, layers=3, budgets=budgets, tied=tied, pairs=pairs))
    allocation = EXACT.search(problem)
    assert problem.fits(allocation)
    assert problem.scores.total(allocation) == pytest.approx(best_score(problem), abs=1e-9)
    assert bits_of(allocation) == most_bits(problem)


def test_a_difference_of_scores_counts_more_than_any_bits() -> None:
    """One step of the last place of a double: far below what a sum of scores and bits would keep apart."""
    few, many = LayerBits(2, 8), LayerBits(8, 8)
    scores = Scores({"a": {2: 1.0, 8: math.nextafter(1.0, 2.0)}, "b": {2: 3.0, 8: 3.0}}, {})
    allocation = EXACT.search(Problem({"a": (few, many), "b": (few, many)}, scores=scores))
    assert allocation == {"a": few, "b": many}


def test_a_budget_of_exactly_an_allocation_admits_it() -> None:
    problem = random_problem(3, budgets=1)
    bits = LayerBits(3, 4)
    uniform = dict.fromkeys(problem.options, bits)
    exact = {"size": problem.costs["size"].total(uniform)}
    allocation = EXACT.search(Problem(problem.options, problem.costs, exact, problem.scores))
    assert problem.scores.total(allocation) <= problem.scores.total(uniform)


@pytest.mark.parametrize("seed", range(20))
def test_no_budget_is_exceeded_by_a_rounding_error_of_the_solver(seed: int) -> None:
    """Costs of a thousand million, as bit operations are, and a budget that many allocations just miss."""
    source = np.random.default_rng(seed)
    options = tuple(LayerBits(w, 8) for w in (2, 3, 4, 5))
    names = [f"layer{i}" for i in range(12)]
    table = CostTable("operations", 1.0, {n: {b: float(source.integers(10**9)) for b in options} for n in names})
    scores = Scores(
        {n: {b.weight: -table.layers[n][b] * (1 + 1e-9 * source.random()) for b in options} for n in names}, {}
    )
    cheapest = min(table.total(dict.fromkeys(names, bits)) for bits in options)
    problem = Problem(dict.fromkeys(names, options), {"work": table}, {"work": cheapest * 1.01}, scores)
    assert table.total(IntegerProgram().search(problem)) <= math.floor(problem.budgets["work"])


def test_budgets_that_exclude_each_other_are_refused_with_the_nearest() -> None:
    few_weights, few_inputs = LayerBits(2, 8), LayerBits(8, 2)
    options = {"a": (few_weights, few_inputs)}
    costs = {
        "size": CostTable("bytes", 0.0, {"a": {few_weights: 2.0, few_inputs: 8.0}}),
        "time": CostTable("ms", 0.0, {"a": {few_weights: 8.0, few_inputs: 2.0}}),
    }
    with pytest.raises(ValueError, match=r"budgets.size and budgets.time: cannot be met together; .* 2 bytes, 8 ms"):
        EXACT.search(Problem(options, costs, {"size": 2.0, "time": 7.0}))


def test_same_problem_same_answer() -> None:
    problem = random_problem(5, layers=8, budgets=2)
    assert EXACT.search(problem) == EXACT.search(problem)


def test_a_program_as_large_as_resnet50s_stays_small_in_variables() -> None:
    """54 layers with 49 options each: what others dominate is left out first."""
    source = np.random.default_rng(0)
    widths = (2, 3, 4, 5, 6, 7, 8)
    options = tuple(LayerBits(w, a) for w in widths for a in widths)
    names = [f"layer{i}" for i in range(54)]
    sizes = {n: source.lognormal(10) for n in names}
    fall = {n: {b: 2 ** source.normal() * 4.0**-b for b in widths} for n in names}
    fall = {n: dict(zip(widths, sorted(of.values(), reverse=True), strict=True)) for n, of in fall.items()}
    table = CostTable("bytes", 0.0, {n: {bits: sizes[n] * bits.weight for bits in options} for n in names})
    budget = table.total(dict.fromkeys(names, LayerBits(4, 4)))
    problem = Problem(dict.fromkeys(names, options), {"size": table}, {"size": budget}, Scores(fall, fall))
    allocation = IntegerProgram().search(problem)
    assert table.total(allocation) <= budget
    assert {bits.input for bits in allocation.values()} == {8}, "inputs are free under a budget of size"
    assert max(len(_without_dominated(group, keep_all=False).options) for group in problem.groups()) <= len(widths)
