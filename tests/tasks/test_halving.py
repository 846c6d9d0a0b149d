"""Successive halving: who stays, for how long, and that the best is found."""

from __future__ import annotations

import pytest

from qtrain.tasks.halving import Score, best, rung_epochs, search


def test_the_best_share_stays_best_first() -> None:
    scores = {"a": Score(50, 1.0), "b": Score(70, 2.0), "c": Score(70, 1.0), "d": Score(10, 0.1), "e": Score(60, 1.0)}
    assert best(scores, 0.5) == ["c", "b"]  # of equals the one with the lower loss
    assert best(scores, 0.1) == ["c"]  # at least one
    assert best(scores, 0.5, spared="d") == ["c", "b", "d"]
    assert best({"a": Score(1, 1), "b": Score(1, 1)}, 0.5) == ["a"]


@pytest.mark.parametrize(
    ("epochs", "rungs", "keep", "expected"), [(1, 1, 0.5, [1]), (2, 3, 0.5, [2, 4, 8]), (1, 3, 1 / 3, [1, 3, 9])]
)
def test_what_remains_of_candidates_they_gain_in_epochs(
    epochs: int, rungs: int, keep: float, expected: list[int]
) -> None:
    assert rung_epochs(epochs, rungs, keep) == expected


def test_a_search_measures_each_rung_and_spares_one() -> None:
    """Sixteen candidates, better by their number; two are overtaken only by those that take long to start."""
    asked: list[tuple[str, int]] = []

    def measure(name: str, epochs: int) -> Score:
        asked.append((name, epochs))
        return Score(float(name) if name != "alone" else -1.0, 0.0)

    names = ["alone", *map(str, range(16))]
    rungs = search(names, measure, epochs=[1, 2, 4], keep=0.5, spared="alone")
    assert [len(rung) for rung in rungs] == [17, 9, 5]
    assert set(rungs[2]) == {"15", "14", "13", "12", "alone"}
    assert [epochs for _, epochs in asked] == [1] * 17 + [2] * 9 + [4] * 5
    assert sum(epochs for _, epochs in asked) == 55
