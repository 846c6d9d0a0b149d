"""All pictures of a sweep: which there are, that each one compiles, and the importance of knobs."""

from __future__ import annotations

from pathlib import Path

import pytest
import vl_convert

from qtrain.report import chart
from qtrain.report.sweep_plots import importance, plots
from qtrain.sweep.sweep_results import SweepResults, read_sweep
from qtrain.sweep.trial import Trial


@pytest.fixture
def sweep(sweep_folder: Path) -> SweepResults:
    return read_sweep(sweep_folder)


def with_trials(sweep: SweepResults, trials: list[Trial]) -> SweepResults:
    return SweepResults(sweep.folder, sweep.config, trials, sweep.objectives)


SHARES = {"top1": {"optimizer.lr": 0.5, "widths.layer1.0": 0.3}, "size_bytes": {"widths.layer1.0": 1.0}}


def test_each_chart_is_drawn_by_vega(sweep: SweepResults, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SweepResults, "importance", lambda self, name: SHARES[name])
    for plot in plots(sweep):
        drawn = plot.draw(sweep)
        assert drawn is not None, plot.name
        svg = vl_convert.vegalite_to_svg({**chart.spec(drawn), "config": chart.LOOK})
        assert "var(--c0)" in svg and "NaN" not in svg and not chart.spec(drawn).get("$schema"), plot.name


def test_nothing_finished_leaves_only_parallel_coordinates(sweep: SweepResults) -> None:
    stopped = with_trials(sweep, sweep.trials[3:5])
    assert [plot.name for plot in plots(stopped) if plot.draw(stopped) is not None] == []
    assert next(plots(with_trials(sweep, []))).name == "layer_bits"  # there are no planes


def test_importance_has_one_panel_for_each_objective(sweep: SweepResults, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SweepResults, "importance", lambda self, name: SHARES[name])
    drawn = importance(sweep)
    assert drawn is not None
    (rows,) = chart.spec(drawn)["datasets"].values()
    assert [(row["objective"], row["knob"], row["share"]) for row in rows] == [
        ("val top-1 %", "lr", 50), ("val top-1 %", "widths.layer1.0", 30), ("val top-1 %", "not explained", 20),
        ("size", "lr", 0), ("size", "widths.layer1.0", 100), ("size", "not explained", 0),
    ]  # fmt: skip


def test_unexplained_differences_are_no_picture(sweep: SweepResults, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SweepResults, "importance", lambda self, name: {})
    assert importance(sweep) is None
