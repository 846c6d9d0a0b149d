"""The other searches: the whole front, chance, and evolution, each within the budgets."""

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtrain.allocate.base import Search
from qtrain.allocate.evolution import Evolution
from qtrain.allocate.integer_program import IntegerProgram
from qtrain.allocate.pareto import Pareto, _undominated
from qtrain.allocate.problem import Problem
from qtrain.allocate.random_draw import RandomDraw
from qtrain.spec import Allocation, CostTable, LayerBits, Scores
from tests.allocate.problems import (
    best_score,
    bits_of,
    everything,
    most_bits,
    random_problem,
    slow_few_bits,
    uneven_kernels,
    with_equal_scores,
)

ENDS = {"weight": 3, "input": 4, "first": None, "last": None}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("budgets", "tied"), [(1, False), (2, False), (3, False), (1, True), (3, True)])
def test_the_front_ends_with_the_least_score(seed: int, budgets: int, tied: bool) -> None:
    problem = random_problem(seed, budgets=budgets, tied=tied)
    assert problem.scores.total(Pareto().search(problem)) == pytest.approx(best_score(problem), rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_the_front_has_every_allocation_that_none_beats(seed: int) -> None:
    problem = random_problem(seed, layers=3, budgets=1, tightness=1.0)
    size = problem.costs["size"]
    every = {(round(problem.scores.total(a), 9), round(size.total(a), 9)) for a in everything(problem)}
    best = {(s, c) for s, c in every if not any(t <= s and d <= c and (t, d) != (s, c) for t, d in every)}
    found = {(round(point.score, 9), round(point.costs["size"], 9)) for point in Pareto().front(problem)}
    assert found == best
    assert all(point.costs["size"] == size.total(point.allocation) for point in Pareto().front(problem))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("budgets", "tied"), [(1, False), (2, False), (1, True)])
def test_the_front_ends_with_the_most_bits_of_equal_scores(seed: int, budgets: int, tied: bool) -> None:
    problem = with_equal_scores(random_problem(seed, layers=3, budgets=budgets, tied=tied))
    allocation = Pareto().search(problem)
    assert problem.scores.total(allocation) == pytest.approx(best_score(problem), rel=1e-9)
    assert bits_of(allocation) == most_bits(problem)


def test_a_thinned_front_stays_near_the_best() -> None:
    problem = random_problem(1, layers=6, budgets=1)
    exact, thinned = (problem.scores.total(Pareto(points=n).search(problem)) for n in (10**6, 200))
    assert exact <= thinned <= 1.02 * exact


@pytest.mark.parametrize("points", [20, 20_000])
def test_a_budget_that_all_options_cost_alike_thins_nothing_away(points: int) -> None:
    problem = random_problem(3, layers=6, budgets=2)
    alike = replace(problem.costs["size"], layers={n: dict.fromkeys(o, 7.0) for n, o in problem.options.items()})
    flat = replace(
        problem, costs={**problem.costs, "size": alike}, budgets={"size": 100.0, "work": problem.budgets["work"]}
    )
    found = flat.scores.total(Pareto(points=points).search(flat))
    assert found == pytest.approx(best_score(flat), rel=1e-9 if points > 20 else 0.05)


@pytest.mark.parametrize("budgets", [1, 2])
def test_a_front_thinned_by_all_its_costs_stays_near_the_best(budgets: int) -> None:
    problem = random_problem(1, layers=6, budgets=budgets)
    exact, thinned = (problem.scores.total(Pareto(points=n).search(problem)) for n in (10**6, 400))
    assert exact <= thinned <= 1.05 * exact


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=60))
def test_of_two_costs_none_that_another_beats_stays(points: list[tuple[int, int, int]]) -> None:
    """Against comparing all with all; a third cost that is 0 for all takes the general way."""
    scores, *costs = (np.array(column, dtype=float) for column in zip(*points, strict=True))
    bits = np.zeros(len(points))
    two = _undominated(scores, bits, np.stack(costs))
    three = _undominated(scores, bits, np.stack([*costs, bits]))
    assert two.tolist() == three.tolist()
    assert_undominated(points, two.tolist())


@given(st.lists(st.tuples(*[st.integers(0, 5)] * 4), min_size=1, max_size=80))
def test_of_three_costs_none_that_another_beats_stays(points: list[tuple[int, ...]]) -> None:
    scores, *costs = (np.array(column, dtype=float) for column in zip(*points, strict=True))
    assert_undominated(points, _undominated(scores, np.zeros(len(points)), np.stack(costs)).tolist())


@pytest.mark.parametrize("metrics", [3, 4])
def test_of_many_points_none_that_another_beats_stays(metrics: int) -> None:
    """Several blocks, and a grid with cells that hold several."""
    drawn = np.random.default_rng(0).integers(0, 30, size=(1500, metrics + 1)).astype(float)
    kept = _undominated(drawn[:, 0], np.zeros(len(drawn)), drawn[:, 1:].T)
    assert_undominated(list(map(tuple, drawn.tolist())), kept.tolist())


def assert_undominated(points: Sequence[tuple[float, ...]], kept: list[int]) -> None:
    """``kept`` are the places of all ``points`` that no other one equals or beats in every respect, each once."""
    table = np.array(points, dtype=float)
    beaten = {point for point in points if ((table <= point).all(axis=1) & (table != point).any(axis=1)).any()}
    assert {points[place] for place in kept} == set(points) - beaten
    assert len(kept) == len({points[place] for place in kept}), "of equal points one stays"


def test_three_budgets_of_a_network_are_within_reach() -> None:
    """54 layers, as many as ResNet-50 has; the points that nobody beats are thinned to a few thousand."""
    problem = random_problem(5, layers=54, budgets=3)
    found, best = (search.search(problem) for search in (Pareto(points=1000), IntegerProgram()))
    assert problem.fits(found)
    assert problem.scores.total(best) <= problem.scores.total(found) <= 1.3 * problem.scores.total(best)


@pytest.mark.parametrize("search", [RandomDraw(), Evolution(generations=1, population=4, children=4), Pareto()])
def test_what_can_be_met_is_found_where_more_bits_are_sometimes_faster(search: Search) -> None:
    """Lowering greedily ends in a corner for some of these: the integer program, which is exact, then helps."""
    met = 0
    for problem in filter(None, map(uneven_kernels, range(40))):
        try:
            IntegerProgram().search(problem)
        except ValueError as error:
            with pytest.raises(ValueError, match=re.escape(str(error))):  # as near as one comes, by each search
                search.search(problem)
        else:
            met += 1
            assert problem.fits(search.search(problem))
    assert met > 20


def test_points_that_were_thinned_away_are_no_reason_to_give_up() -> None:
    """Two points stay of each layer, and none of them leads within both budgets."""
    problem = random_problem(9, layers=6, budgets=2, tightness=0.05)
    assert problem.fits(Pareto(points=2).search(problem))


@pytest.mark.parametrize("search", [IntegerProgram(), Pareto(), RandomDraw(), Evolution(generations=1)])
def test_more_bits_are_taken_where_only_they_are_cheap_enough(search: Search) -> None:
    problem = slow_few_bits(budget=41.0)
    assert set(search.search(problem).values()) == {LayerBits(8, 8)}


def test_budgets_that_no_lowering_meets_are_met_by_the_cheapest() -> None:
    """Each layer's options swap the two costs, so that lowering one raises the other."""
    few_weights, few_inputs, both = LayerBits(2, 8), LayerBits(8, 2), LayerBits(4, 4)
    row = {few_weights: 1.0, few_inputs: 3.0, both: 2.0}
    other = {few_weights: 2.1, few_inputs: 1.0, both: 3.0}
    names = [f"layer{i}" for i in range(5)]
    costs = {"size": CostTable("bytes", 0.0, dict.fromkeys(names, row)),
             "time": CostTable("ms", 0.0, dict.fromkeys(names, other))}  # fmt: skip
    problem = Problem(dict.fromkeys(names, (both, few_inputs, few_weights)), costs, {"size": 5.0, "time": 10.5})
    assert set(RandomDraw(**ENDS).search(problem).values()) == {few_weights}


@pytest.mark.parametrize("worst", [float("nan"), float("inf")])
def test_evolution_goes_past_a_loss_that_is_not_finite(worst: float) -> None:
    problem, _ = with_loss(random_problem(2, layers=4, budgets=1))
    finite, calls = problem.loss, iter(range(10**6))
    strange = replace(problem, loss=lambda allocation: worst if next(calls) % 3 == 0 else finite(allocation))
    allocation = Evolution(**ENDS, generations=3, population=6, children=20).search(strange)
    assert problem.fits(allocation)
    with pytest.raises(ValueError, match="no loss that was measured is finite; start from other weights"):
        Evolution(**ENDS, generations=2, population=4).search(replace(problem, loss=lambda _: worst))


def test_the_front_refuses_pairs() -> None:
    with pytest.raises(ValueError, match="pairs do not add up layer by layer; use allocate=integer_program"):
        Pareto().search(random_problem(0, pairs=True))


def with_loss(problem: Problem) -> tuple[Problem, list[Allocation]]:
    """``problem`` whose measured loss is one and its score, and a record of what was measured."""
    measured: list[Allocation] = []

    def loss(allocation: Allocation) -> float:
        measured.append(allocation)
        return 1 + problem.scores.total(allocation)

    return Problem(problem.options, problem.costs, problem.budgets, Scores({}, {}), problem.ties, loss, 0), measured


@pytest.mark.parametrize("search", [RandomDraw(**ENDS), Evolution(**ENDS, generations=2, population=6, children=20)])
@pytest.mark.parametrize("tightness", [0.0, 0.1, 0.5, 1.0])
def test_every_search_stays_within_the_budgets(search: Search, tightness: float) -> None:
    problem, measured = with_loss(random_problem(2, layers=6, budgets=2, tightness=tightness, tied=True))
    allocation = search.search(problem)
    assert problem.fits(allocation)
    assert all(map(problem.fits, measured))
    assert allocation["layer0"] == allocation["layer1"]
    assert search.search(problem) == allocation, "the same seed gives the same answer"


def test_chance_uses_what_room_there_is() -> None:
    problem = random_problem(4, layers=6, budgets=1)
    allocation = dict(RandomDraw(**ENDS).search(problem))
    for layer, bits in allocation.items():
        larger = [o for o in problem.options[layer] if o != bits and o.weight >= bits.weight and o.input >= bits.input]
        assert not any(problem.fits({**allocation, layer: option}) for option in larger)


def test_other_seeds_draw_other_allocations() -> None:
    problem = random_problem(4, layers=6, budgets=1)
    other = Problem(problem.options, problem.costs, problem.budgets, seed=11)
    assert RandomDraw(**ENDS).search(problem) != RandomDraw(**ENDS).search(other)


def test_evolution_comes_near_the_best_with_few_measurements() -> None:
    problem, measured = with_loss(random_problem(7, layers=6, budgets=1))
    found = Evolution(**ENDS, generations=8, population=12, children=100).search(problem)
    every = sorted(1 + random_problem(7, layers=6).scores.total(a) for a in everything(problem))
    place = sum(loss < problem.loss(found) - 1e-9 for loss in every)
    assert len({tuple(a.items()) for a in measured}) <= 8 * 12 + 1
    assert place / len(every) < 0.005, f"{place} of {len(every)} are better"


def test_evolution_begins_with_the_allocation_of_the_least_score() -> None:
    problem, measured = with_loss(random_problem(7, layers=6, budgets=1))
    scored = replace(problem, scores=random_problem(7, layers=6).scores)
    Evolution(**ENDS, generations=1, population=4).search(scored)
    assert measured[1] == IntegerProgram().search(scored)


def test_evolution_measures_the_reference_first() -> None:
    problem, measured = with_loss(random_problem(7, layers=4, budgets=1, tightness=1.0))
    Evolution(**ENDS, generations=1, population=4).search(problem)
    assert set(measured[0].values()) == {LayerBits(4, 4)}, "the reference raised to what the budgets allow"
