"""The grid: every combination once, wanted ones first, and not more than anyone waits for."""

from __future__ import annotations

import json

import pytest

from qtrain.sweep.knobs import Choice, Knob, UniformRange
from qtrain.sweep.searcher import NO_MORE, GridSearcher
from qtrain.sweep.space import Point, Space

KNOBS: dict[str, Knob] = {
    "objective": Choice(options=["soft", "hard"]),
    "distill.temperature": Choice(options=[1.0, 2.0, 4.0], when={"objective": ["soft"]}),
    "optimizer.lr": UniformRange(low=0, high=1),
}


def proposed(searcher: GridSearcher) -> list[Point]:
    found: list[Point] = []
    while (point := searcher.suggest(f"t{len(found)}")) != NO_MORE:
        assert isinstance(point, dict)
        found.append(point)
    return found


def test_a_grid_is_every_combination_once_in_an_order_of_its_seed() -> None:
    space = Space(KNOBS)
    first, again, other = (proposed(GridSearcher(space, points=3, trials=99, seed=seed)) for seed in (0, 0, 1))
    assert first == again != other
    everything = {json.dumps(point, sort_keys=True) for point in space.combinations(3)}
    assert len(first) == len(everything) == (3 + 1) * 3
    assert {json.dumps(point, sort_keys=True) for point in first} == everything
    assert first != list(space.combinations(3)), "its order tells nothing of the knobs"


def test_one_that_agrees_with_each_start_comes_first() -> None:
    start: list[Point] = [{"objective": "soft", "optimizer.lr": 0.5}, {"distill.temperature": 4.0, "optimizer.lr": 1.0}]
    searcher = GridSearcher(Space(KNOBS), points=3, trials=4, seed=0, start=start)
    points = proposed(searcher)
    assert (points[0]["objective"], points[0]["optimizer.lr"]) == ("soft", 0.5)
    # Without a temperature it is the second's as well.
    assert (points[1].get("distill.temperature", 4.0), points[1]["optimizer.lr"]) == (4.0, 1.0)
    assert len(points) == searcher.trials == 4
    assert len({str(point) for point in points}) == 4, "none of them comes again"
    assert searcher.overrides("t0") == Space(KNOBS).overrides(points[0])
    assert searcher.parent("t0") is None


def test_a_grid_that_nobody_can_walk_is_refused() -> None:
    space = Space({str(i): Choice(options=[2, 3, 4]) for i in range(20)})
    with pytest.raises(ValueError, match=r"GridSearch: the space has 3,486,784,401 combinations.*nsga2"):
        GridSearcher(space, points=2, trials=8, seed=0)
