"""The first objective against a cost: where trials stand, what is marked, what the plot's limits leave out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from qtrain.report.pareto_plot import BEYOND, FINISHED, FRONT, STOPPED, UNIFORM, pareto_scatter, planes
from qtrain.report.scatter import Scatter
from qtrain.sweep.sweep_results import SweepResults, read_sweep
from qtrain.sweep.trial import Trial


@pytest.fixture
def sweep(sweep_folder: Path) -> SweepResults:
    return read_sweep(sweep_folder)


def with_trials(sweep: SweepResults, trials: list[Trial]) -> SweepResults:
    return SweepResults(sweep.folder, sweep.config, trials, sweep.objectives)


def drawn(sweep: SweepResults, cost: str) -> Scatter:
    scatter = pareto_scatter(sweep, cost)
    assert scatter is not None
    return scatter


def test_trials_stand_where_their_metrics_are(sweep: SweepResults) -> None:
    """Sizes are in kB. The stopped trial is drawn; the failed one and the duplicate are not."""
    points = {(point.trial, point.kind): point for point in drawn(sweep, "size_bytes").points}
    assert points.keys() == {(1, FRONT), (1, UNIFORM), (2, FRONT), (3, FINISHED), (4, BEYOND)}
    places = {trial: (point.x, point.y) for (trial, _), point in points.items() if trial < 4}
    assert places == {1: (8.0, 96.5), 2: (6.0, 90.25), 3: (7.0, 88.0)}


def test_labels_are_places_on_the_front_and_uniform_bits(sweep: SweepResults) -> None:
    assert sorted(point.label for point in drawn(sweep, "size_bytes").points if point.label) == ["1 W4A4", "2"]


def test_stairs_are_the_best_at_each_cost(sweep: SweepResults) -> None:
    scatter = drawn(sweep, "size_bytes")
    assert scatter.stairs == [(6.0, 90.25), (8.0, 96.5)] and scatter.level_first


def test_objective_to_minimize_and_cost_to_maximize_turn_the_stairs(sweep: SweepResults) -> None:
    metrics = [{"loss": 0.2, "compression": 4.0}, {"loss": 0.5, "compression": 8.0}, {"loss": 0.9, "compression": 5.0}]
    trials = [replace(t, metrics=f) for t, f in zip(sweep.trials, metrics, strict=False)]
    other = SweepResults(sweep.folder, {}, trials, {"loss": "min", "compression": "max"})
    assert planes(other) == ["compression"]
    scatter = drawn(other, "compression")
    assert scatter.stairs == [(4.0, 0.2), (8.0, 0.5)] and not scatter.level_first


def test_collapsed_trial_is_drawn_at_the_lower_edge(sweep: SweepResults) -> None:
    collapsed = replace(sweep.trials[2], metrics={**sweep.trials[2].metrics, "top1": 10.0})
    trials = [collapsed if trial.id == collapsed.id else trial for trial in sweep.trials]
    scatter = drawn(with_trials(sweep, trials), "size_bytes")
    bottom, top = scatter.y_range
    (point,) = (point for point in scatter.points if point.trial == 3)
    assert point.kind == BEYOND and 80 < bottom < point.y < 90.25 and top > 96.5


def test_trial_near_the_front_is_on_the_scale(sweep: SweepResults) -> None:
    assert drawn(with_trials(sweep, sweep.trials[:3]), "size_bytes").present == [FINISHED, FRONT, UNIFORM]


def test_full_precision_is_a_reference_where_it_is_known(sweep: SweepResults) -> None:
    known = [replace(t, metrics={**t.metrics, "fp_top1": 97.25}) for t in sweep.trials]
    assert drawn(with_trials(sweep, known), "bops").references == [(97.25, "full precision 97.25 %", None)]
    assert drawn(sweep, "bops").references == []


def test_without_a_finished_trial_there_is_no_picture(sweep: SweepResults) -> None:
    stopped = with_trials(sweep, sweep.trials[3:5])
    assert stopped.trials[0].status == "stopped" and pareto_scatter(stopped, "size_bytes") is None
    assert STOPPED not in drawn(sweep, "size_bytes").present
