"""The rule that stops trials early, seen through ids: as Ray's own on undisturbed sweeps, and after a restart."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import AsyncHyperBandScheduler, MedianStoppingRule, TrialScheduler

from qtrain.sweep.early_stopping import EarlyStopping
from qtrain.sweep.search_log import Event


def asha() -> TrialScheduler:
    return AsyncHyperBandScheduler(
        time_attr="epochs", metric="top1", mode="max", max_t=9, grace_period=1, reduction_factor=3
    )


def median() -> TrialScheduler:
    return MedianStoppingRule(
        time_attr="epochs", metric="top1", mode="max", grace_period=1, min_samples_required=2, min_time_slice=1000
    )


def judge(rule: Any) -> EarlyStopping:
    return EarlyStopping(rule, metric="top1", name=lambda trial: trial.config)


def ray_trial(id: str) -> Any:
    """A trial of Ray's, whose own id says nothing."""
    return SimpleNamespace(trial_id=object(), config=id)


REPORTS = [
    ("a", 1, 50.0), ("b", 1, 60.0), ("c", 1, 40.0), ("d", 1, 70.0), ("a", 3, 55.0), ("d", 3, 54.0), ("e", 1, 30.0),
]  # fmt: skip


@pytest.mark.parametrize("make", [asha, median])
@pytest.mark.parametrize("restart", range(len(REPORTS)))
def test_a_restart_changes_no_decision(make: Any, restart: int) -> None:
    whole = judge(make())
    expected = [whole.on_trial_result(None, ray_trial(id), {"epochs": n, "top1": top1}) for id, n, top1 in REPORTS]
    assert TrialScheduler.STOP in expected and TrialScheduler.CONTINUE in expected
    again = judge(make())
    for id, n, top1 in REPORTS[:restart]:
        again.again(Event(kind="reported", id=id, metrics={"epochs": float(n), "top1": top1}))
    found = [again.on_trial_result(None, ray_trial(id), {"epochs": n, "top1": t}) for id, n, t in REPORTS[restart:]]
    assert found == expected[restart:]


def test_what_has_ended_is_not_judged() -> None:
    rule = judge(asha())
    for id, top1 in (("a", 50.0), ("b", 60.0)):
        rule.on_trial_result(None, ray_trial(id), {"epochs": 1, "top1": top1})
    last = {"epochs": 9, "top1": 1.0, "status": "finished"}
    assert rule.on_trial_result(None, ray_trial("a"), last) == TrialScheduler.CONTINUE


def test_a_failed_trial_leaves_the_rule_as_it_was() -> None:
    rule = judge(median())
    for id, top1 in (("a", 50.0), ("b", 60.0), ("c", 70.0)):
        rule.on_trial_result(None, ray_trial(id), {"epochs": 1, "top1": top1})
    rule.on_trial_complete(None, ray_trial("b"), {"status": "failed"})
    rule.on_trial_complete(None, ray_trial("unknown"), {"epochs": 1, "top1": 3.0})
    assert rule.on_trial_result(None, ray_trial("d"), {"epochs": 1, "top1": 10.0}) == TrialScheduler.STOP


def test_whom_the_sweep_was_told_to_start_with_is_spared_and_still_counts() -> None:
    spared = EarlyStopping(
        asha(), metric="top1", name=lambda trial: trial.config, spares=lambda trial: trial.config == "c"
    )
    whole = judge(asha())
    for id, epochs, top1 in REPORTS:
        told = {"epochs": epochs, "top1": top1}
        expected = whole.on_trial_result(None, ray_trial(id), told)
        found = spared.on_trial_result(None, ray_trial(id), told)
        assert found == (TrialScheduler.CONTINUE if id == "c" else expected)
    assert whole.stopped - spared.stopped == {"c"}
