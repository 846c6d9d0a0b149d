"""The front and the ranks against their definitions."""

from __future__ import annotations

import random
from collections.abc import Mapping

import pytest

from qtrain.sweep.pareto import Direction, dominates, front, losses_of, ranked
from qtrain.sweep.trial import Status, Trial

OBJECTIVES: dict[str, Direction] = {"top1": "max", "size_bytes": "min", "bops": "min"}


def trial(name: str, /, status: Status = "finished", **metrics: float) -> Trial:
    return Trial(id=name, key=name, status=status, metrics=metrics)


def drawn(seed: int, objectives: Mapping[str, Direction], count: int = 40, span: int = 8) -> list[Trial]:
    """Trials with small whole metrics, so that ties and equal points abound."""
    source = random.Random(seed)
    metrics = ({name: float(source.randrange(span)) for name in objectives} for _ in range(count))
    return [Trial(id=str(i), key=str(i), status="finished", metrics=own) for i, own in enumerate(metrics)]


def beats(a: Trial, b: Trial, objectives: Mapping[str, Direction]) -> bool:
    """Domination as the textbook has it, word for word."""
    better = {
        name: a.metrics[name] > b.metrics[name] if way == "max" else a.metrics[name] < b.metrics[name]
        for name, way in objectives.items()
    }
    worse = {
        name: a.metrics[name] < b.metrics[name] if way == "max" else a.metrics[name] > b.metrics[name]
        for name, way in objectives.items()
    }
    return any(better.values()) and not any(worse.values())


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_front_is_what_no_other_trial_beats(seed: int, number: int) -> None:
    objectives = dict(list(OBJECTIVES.items())[:number])
    trials = drawn(seed, objectives)
    expected = {t.id for t in trials if not any(beats(other, t, objectives) for other in trials)}
    found = front(trials, objectives)
    assert {t.id for t in found} == expected
    tops = [t.metrics["top1"] for t in found]
    assert tops == sorted(tops, reverse=True), "the best by the first objective comes first"


def test_only_what_was_run_to_its_end_is_compared() -> None:
    best = trial("finished", top1=50.0, size_bytes=10.0)
    others = [
        trial("stopped", "stopped", top1=90.0, size_bytes=1.0),
        trial("failed", "failed", top1=90.0, size_bytes=1.0),
        trial("duplicate", "duplicate", top1=90.0, size_bytes=1.0),
        trial("lacks a metric", top1=90.0),
    ]
    assert front([*others, best], {"top1": "max", "size_bytes": "min"}) == [best]


def test_equal_trials_do_not_beat_each_other() -> None:
    twins = [trial("a", top1=1.0), trial("b", top1=1.0)]
    assert front(twins, {"top1": "max"}) == twins
    assert not dominates((1.0, 2.0), (1.0, 2.0))


def test_ranks_go_front_by_front_and_within_one_to_the_loneliest() -> None:
    """Worked by hand: of the front a, b, c, d the ends come first, then c, whose neighbors are further apart."""
    points = {"a": (0.0, 10.0), "b": (1.0, 9.0), "c": (5.0, 2.0), "d": (10.0, 0.0), "e": (6.0, 6.0), "f": (11.0, 11.0)}
    order = [list(points)[place] for place in ranked(list(points.values()))]
    assert order == ["a", "d", "c", "b", "e", "f"]
    assert ranked([]) == []
    assert ranked([(1.0,), (0.0,), (1.0,)]) == [1, 0, 2], "with one objective the order of its values"


@pytest.mark.parametrize("seed", range(5))
def test_nobody_is_ranked_behind_whom_it_beats(seed: int) -> None:
    trials = drawn(seed, OBJECTIVES)
    points = [losses_of(t.metrics, OBJECTIVES) for t in trials]
    order = ranked(points)
    assert sorted(order) == list(range(len(points)))
    for place, here in enumerate(order):
        assert not any(dominates(points[later], points[here]) for later in order[place + 1 :])
