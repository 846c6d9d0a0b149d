"""The other searches: the whole front, chance, and evolution, each within the budgets."""

from dataclasses import replace

import pytest

from qtrain.allocate.base import Search
from qtrain.allocate.evolution import Evolution
from qtrain.allocate.integer_program import IntegerProgram
from qtrain.allocate.pareto import Pareto
from qtrain.allocate.problem import Problem
from qtrain.allocate.random_draw import RandomDraw
from qtrain.spec import Allocation, LayerBits, Scores
from tests.allocate.problems import best_score, bits_of, everything, most_bits, random_problem, with_equal_scores

ENDS = {"weight": 3, "input": 4, "first": None, "last": None}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("budgets", "tied"), [(1, False), (2, False), (1, True)])
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
