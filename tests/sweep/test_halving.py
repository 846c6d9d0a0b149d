"""Successive halving by several objectives, on trials whose places are known."""

from __future__ import annotations

from qtrain.sweep.halving import ParetoHalving


def test_one_in_so_many_goes_on_and_ties_of_fronts_are_broken_by_loneliness() -> None:
    rule = ParetoHalving(grace=1, reduction=2, last=8)
    # On a line where less of one costs more of the other, the ends are loneliest.
    line = [(0.0, 8.0), (8.0, 0.0), (4.0, 4.0), (4.1, 3.9), (1.0, 7.0)]
    assert [rule.goes_on(f"t{n}", 1, point) for n, point in enumerate(line)] == [True, False, False, False, True]


def test_a_trial_is_judged_once_at_each_rung_and_never_at_its_end() -> None:
    rule = ParetoHalving(grace=1, reduction=3, last=9)
    assert rule.goes_on("good", 1, (1.0, 1.0)) and not rule.goes_on("bad", 1, (2.0, 2.0))
    assert rule.goes_on("bad", 2, (2.0, 2.0)), "known at this rung"
    assert rule.goes_on("good", 3, (1.0, 1.0)) and not rule.goes_on("bad", 3, (2.0, 2.0))
    assert rule.goes_on("good", 9, (1.0, 1.0))
    assert rule.goes_on("bad", 9, (9.0, 9.0)), "there is no rung at the last epoch, where it would come second"


def test_what_nobody_dominates_stays_whatever_it_is_good_at() -> None:
    rule = ParetoHalving(grace=1, reduction=2, last=2)
    kept = [rule.goes_on(name, 1, point) for name, point in {
        "accurate": (-91.0, 100.0), "slow": (-90.0, 120.0), "small": (-80.0, 50.0), "nothing": (-79.0, 130.0),
    }.items()]  # fmt: skip
    assert kept == [True, False, True, False]
