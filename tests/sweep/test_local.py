"""Local search: neighbors of the front, of each of its points in turn, and of nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from qtrain.sweep.bit_widths import BitWidths
from qtrain.sweep.knobs import Choice
from qtrain.sweep.local import LocalSearcher
from qtrain.sweep.pareto import Direction
from qtrain.sweep.search import LocalSearch
from qtrain.sweep.space import Point, Space

LAYERS = ["conv1", *(f"layer{stage}.0.conv{n}" for stage in (1, 2, 3) for n in (1, 2)), "fc"]
BOTH: dict[str, Direction] = {"top1": "max", "size_bytes": "min"}


def searcher(start: list[dict[str, Any]], **settings: float) -> LocalSearcher:
    space = Space({"w": BitWidths(choices=[2, 3, 4, 8]), "lr": Choice(options=[0.1, 0.2, 0.4])}, layers=LAYERS)
    own = LocalSearch(**{"startup": 1, "change": 0.0, "resample": 0.0, **settings})  # type: ignore[arg-type]
    return LocalSearcher(space, own, objectives=BOTH, seed=0, start=start)


def asked(search: LocalSearcher, id: str) -> Point:
    point = search.suggest(id)
    assert isinstance(point, dict)
    return point


def apart(one: Point, other: Point) -> list[str]:
    return [name for name in one if one[name] != other[name]]


def test_a_neighbor_differs_in_one_knob_by_one_step() -> None:
    search = searcher([{"w": 3, "lr": 0.2}])
    first = asked(search, "0")
    search.on_trial_complete("0", {"top1": 50.0, "size_bytes": 9.0})
    found = [asked(search, f"{n}") for n in range(1, 9)]
    for point in found:
        (name,) = apart(first, point)
        assert point[name] in ((2, 4) if name.startswith("w") else (0.1, 0.4))
    assert len({str(point) for point in found}) == 8, "all of its neighbors, each once"


def test_neighbors_are_of_the_front_each_of_its_points_in_turn() -> None:
    search = searcher([{"w": 2, "lr": 0.1}, {"w": 4, "lr": 0.1}, {"w": 8, "lr": 0.4}])
    starts = [asked(search, f"{n}") for n in range(3)]
    for n, (top1, size) in enumerate([(60.0, 2.0), (90.0, 4.0), (80.0, 8.0)]):  # the third is beaten by the second
        search.on_trial_complete(f"{n}", {"top1": top1, "size_bytes": size})
    parents = [
        [len(apart(start, asked_)) == 1 for start in starts] for asked_ in (asked(search, f"n{n}") for n in range(6))
    ]
    assert all(not third for *_, third in parents)
    assert [sum(own) for own in zip(*parents, strict=True)] == [3, 3, 0]


@pytest.mark.parametrize("metrics", [None, {"top1": 99.0}, {"top1": 99.0, "size_bytes": 1.0, "epochs": 1.0}])
def test_what_failed_or_was_stopped_has_no_neighbors(metrics: dict[str, float] | None) -> None:
    search = searcher([{"w": 2, "lr": 0.1}, {"w": 8, "lr": 0.4}])
    starts = [asked(search, f"{n}") for n in range(2)]
    search.on_trial_complete("0", {"top1": 50.0, "size_bytes": 2.0})
    search.on_trial_complete("1", metrics, error=metrics is None)
    for n in range(6):
        assert len(apart(starts[0], asked(search, f"n{n}"))) == 1


def test_before_any_trial_has_ended_points_are_drawn() -> None:
    search = searcher([], startup=3)
    points = [asked(search, f"{n}") for n in range(6)]
    assert len({str(point) for point in points}) > 3
