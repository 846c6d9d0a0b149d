"""Values that a parameter can take: spread, neighbors, grids, and what lies outside."""

from __future__ import annotations

import math
from collections import Counter
from random import Random

import pytest

from qtrain.sweep.domains import Interval, Options


def test_a_logarithmic_interval_spreads_digits() -> None:
    rate = Interval(1e-4, 1e-1, log=True)
    assert [rate.at(share) for share in (0.0, 1 / 3, 2 / 3, 1.0)] == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1])
    drawn = [rate.draw(Random(seed)) for seed in range(3000)]
    assert all(len(f"{value:.10e}".split("e")[0].strip("0")) <= 5 for value in drawn), "four digits and a point"
    decades = Counter(math.floor(math.log10(value)) for value in drawn)
    assert all(850 < decades[decade] < 1150 for decade in (-4, -3, -2)), "a third of them in each decade"


@pytest.mark.parametrize(
    "interval", [Interval(-2.0, 3.0), Interval(0.01, 10.0, log=True), Interval(1, 64, log=True, whole=True)]
)
def test_share_undoes_at(interval: Interval) -> None:
    for share in (0.0, 0.13, 0.5, 1.0):
        value = interval.at(share)
        assert interval.low <= value <= interval.high
        assert interval.at(interval.share(value)) == value, "to the digits that are kept"


def test_whole_numbers_are_equally_likely_up_to_the_ends() -> None:
    counts = Counter(Interval(1, 4, whole=True).draw(Random(seed)) for seed in range(4000))
    assert set(counts) == {1, 2, 3, 4}
    assert all(900 < count < 1100 for count in counts.values())
    assert all(isinstance(value, int) for value in counts)


def test_a_grid_has_both_ends_and_each_whole_number_once() -> None:
    assert Interval(0.0, 1.0).grid(5) == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0])
    assert Interval(1, 3, whole=True).grid(9) == [1, 2, 3]
    assert Options(("a", "b", "c")).grid(2) == ("a", "b", "c")


@pytest.mark.parametrize(("values", "ordered"), [((2, 3, 8), True), ((3, 2), False), (("a", "b"), False), ((1,), True)])
def test_only_rising_numbers_have_an_order(values: tuple[object, ...], ordered: bool) -> None:
    assert Options(values).ordered is ordered


def test_neighbors_of_a_width_are_the_next_ones() -> None:
    widths = Options((2, 3, 4, 8))
    near = {bits: {widths.neighbor(bits, Random(seed)) for seed in range(30)} for bits in widths.values}
    assert near == {2: {3}, 3: {2, 4}, 4: {3, 8}, 8: {4}}
    words = Options(("a", "b", "c"))
    assert {words.neighbor("b", Random(seed)) for seed in range(30)} == {"a", "c"}
    assert Options(("only",)).neighbor("only", Random(0)) == "only"


@pytest.mark.parametrize("interval", [Interval(0.0, 1.0), Interval(1, 3, whole=True), Interval(1, 900, whole=True)])
def test_a_number_moves_both_ways_and_never_stays_or_leaves(interval: Interval) -> None:
    middle = interval.at(0.5)
    moved = {interval.neighbor(middle, Random(seed)) for seed in range(30)}
    assert len(moved) == 2
    assert min(moved) < middle < max(moved)
    for end in (interval.low, interval.high):
        value = interval.at(interval.share(end))
        for seed in range(10):
            near = interval.neighbor(value, Random(seed))
            assert near != value
            assert interval.low <= near <= interval.high


@pytest.mark.parametrize(
    ("domain", "value", "message"),
    [
        (Options((2, 3)), 4, "must be one of 2, 3, got 4"),
        (Options((1, 2)), True, "must be one of 1, 2, got True"),
        (Interval(0.0, 1.0), 1.5, "must be a number from 0 to 1, got 1.5"),
        (Interval(0.0, 1.0), "x", "must be a number from 0 to 1, got 'x'"),
        (Interval(1, 5, whole=True), 2.5, "must be a whole number from 1 to 5, got 2.5"),
    ],
)
def test_what_lies_outside_is_refused(domain: Options | Interval, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        domain.check(value)
