"""Learning curves and parallel coordinates: where the line of each trial runs."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from qtrain.report import chart
from qtrain.report.pareto_plot import FINISHED, FRONT, STOPPED
from qtrain.report.trial_lines import ABSENT, curve_lines, learning_curves, parallel, parallel_axes, parallel_lines
from qtrain.sweep.sweep_results import SweepResults, read_sweep
from qtrain.sweep.trial import Trial


@pytest.fixture
def sweep(sweep_folder: Path) -> SweepResults:
    return read_sweep(sweep_folder)


def with_trials(sweep: SweepResults, trials: list[Trial]) -> SweepResults:
    return SweepResults(sweep.folder, sweep.config, trials, sweep.objectives)


def test_curves_begin_after_the_first_epoch_and_the_front_is_last(sweep: SweepResults) -> None:
    lines = curve_lines(sweep)
    assert [(line.number, line.kind, line.place) for line in lines] == [
        (4, STOPPED, ""), (3, FINISHED, ""), (1, FRONT, "1"), (2, FRONT, "2")
    ]  # fmt: skip
    assert lines[2].points == [(1.0, 92.5), (2.0, 94.5), (3.0, 96.5)] and len(lines[0].points) == 1


def test_chart_has_the_points_of_the_curves_and_the_places_at_their_ends(sweep: SweepResults) -> None:
    drawn = learning_curves(sweep)
    assert drawn is not None
    made = chart.spec(drawn)
    rows, ends = (made["datasets"][layer["data"]["name"]] for layer in made["layer"])
    points = [point for line in curve_lines(sweep) for point in line.points]
    assert [(row["x"], row["y"]) for row in rows] == points and len(points) == 10
    assert [(end["x"], end["y"], end["place"]) for end in ends] == [(3.0, 90.25, "2"), (3.0, 96.5, "1")]


def test_places_of_curves_that_end_near_each_other_keep_apart(sweep: SweepResults) -> None:
    near = with_trials(sweep, [replace(t, metrics=t.metrics | {"size_bytes": float(t.epochs)}) for t in sweep.trials])
    runs = [sweep.folder / "trials" / trial.key / "metrics.jsonl" for trial in near.trials[:2]]
    runs[1].write_text(runs[0].read_text().replace("96.5", "96.4"))
    drawn = learning_curves(near)
    assert drawn is not None
    made = chart.spec(drawn)
    ends = made["datasets"][made["layer"][1]["data"]["name"]]
    low, high = made["layer"][0]["encoding"]["y"]["scale"]["domain"]
    heights = sorted(end["y"] for end in ends)
    assert all(after - before >= 0.039 * (high - low) for before, after in pairwise(heights)) and heights[0] > 90


@pytest.mark.parametrize(("count", "labels"), [(10, 10), (60, 25)])
def test_places_of_many_curves_stay_beside_the_picture(sweep: SweepResults, count: int, labels: int) -> None:
    """All end within 0.01 points; 25 labels have room, and 60 share them."""
    trials = [
        replace(sweep.trials[0], id=f"{n:04d}", key=f"n{n}", metrics={"top1": 96.0 - n / 1e4, "size_bytes": 100.0 - n})
        for n in range(count)
    ]
    for n, trial in enumerate(trials):
        place = sweep.folder / "trials" / trial.key / "metrics.jsonl"
        place.parent.mkdir()
        values = 50.0, 96.0 - n / 1e4
        place.write_text(
            "".join(f'{{"step": {e}, "epoch": {e}, "split": "val", "top1": {y}}}\n' for e, y in enumerate(values))
        )
    drawn = learning_curves(with_trials(sweep, trials))
    assert drawn is not None
    made = chart.spec(drawn)
    ends = made["datasets"][made["layer"][1]["data"]["name"]]
    low, high = made["layer"][0]["encoding"]["y"]["scale"]["domain"]
    heights = [end["y"] for end in ends]
    assert len(ends) == labels and low < min(heights) and max(heights) < high
    assert all(after - before >= 0.0399 * (high - low) for before, after in pairwise(heights))
    named = [int(word) for end in reversed(ends) for word in re.findall(r"\d+", end["place"])]
    assert (named[0], named[-1]) == (1, count) and named == sorted(named)  # the most accurate is on top


def test_curves_without_a_front_are_all_in_sight(sweep: SweepResults) -> None:
    """As in a sweep whose time was over before a trial had finished."""
    stopped = with_trials(sweep, [replace(t, status="stopped") for t in sweep.trials if t.status == "finished"])
    drawn = learning_curves(stopped)
    assert drawn is not None
    values = [y for line in curve_lines(stopped) for _, y in line.points]
    bottom, top = chart.spec(drawn)["layer"][0]["encoding"]["y"]["scale"]["domain"]
    assert values and bottom < min(values) and max(values) < top


def test_single_points_are_no_curves(sweep: SweepResults) -> None:
    assert learning_curves(with_trials(sweep, sweep.trials[3:4])) is None


def test_parallel_axes_are_what_differs(sweep: SweepResults) -> None:
    """Learning rate and objective are equal; a knob of several parameters shows its mean; better is up."""
    axes = parallel_axes(sweep)
    assert [axis.label for axis in axes] == ["widths, mean", "val top-1 %", "size, kB"]
    assert (axes[2].bottom, axes[2].top) == (8.0, 4.0)
    lines = {line.number: [y for _, y in line.points] for line in parallel_lines(sweep, axes)}
    assert lines[1] == [1.0, 1.0, 0.0]  # 4 bits, the most accurate, the largest
    assert lines[2] == pytest.approx([0.5, (90.25 - 70) / 26.5, 0.5])


def test_line_passes_below_a_knob_that_did_not_count(sweep: SweepResults) -> None:
    def with_knob(trial: Trial, value: float | None) -> Trial:
        return replace(trial, knobs=trial.knobs | ({} if value is None else {"t": value}))

    trials = [with_knob(t, v) for t, v in zip(sweep.trials[:3], (1.0, None, 100.0), strict=True)]
    changed = with_trials(sweep, trials)
    axes = parallel_axes(changed)
    (place,) = (place for place, axis in enumerate(axes) if axis.label == "t")
    heights = {line.number: line.points[place][1] for line in parallel_lines(changed, axes)}
    assert heights == {1: 0.0, 2: ABSENT, 3: 1.0} and axes[place].log
    drawn = parallel(changed)
    assert drawn is not None
    made = chart.spec(drawn)
    (unset,) = (layer for layer in made["layer"] if layer["mark"].get("text") == "not set")
    assert made["datasets"][unset["data"]["name"]] == [{"x": place, "y": ABSENT}]


def test_words_are_evenly_spaced_and_their_lines_side_by_side(sweep: SweepResults) -> None:
    trials = [replace(t, knobs={"objective": w}) for t, w in zip(sweep.trials, ("soft", "hard", "soft"), strict=False)]
    axis = parallel_axes(with_trials(sweep, trials))[0]
    assert axis.words == ["hard", "soft"] and (axis.bottom, axis.top) == (-0.5, 1.5)
    assert axis.values["0002"] == 0.0 and axis.values["0001"] == pytest.approx(1.075)  # above the less accurate third
    assert axis.values["0003"] == pytest.approx(0.925)


def test_lists_among_single_choices_are_an_axis_of_words(sweep: SweepResults) -> None:
    chosen: list[Any] = [[4, 4], 8, None]
    trials = [replace(t, knobs={"bits": value}) for t, value in zip(sweep.trials, chosen, strict=False)]
    axis = parallel_axes(with_trials(sweep, trials))[0]
    assert (axis.label, axis.words) == ("bits", ["4 4", "8", "none"])


def test_knobs_that_differ_in_their_last_digits_have_an_axis(sweep: SweepResults) -> None:
    seeds: list[Any] = [20240101, 20240102, 20240103]
    trials = [
        replace(t, knobs={"seed": seed, "lr": 0.1 + 1e-6 * (seed % 2), "of": "x" * 40 + str(seed)})
        for t, seed in zip(sweep.trials, seeds, strict=False)
    ]
    found = {axis.label: axis for axis in parallel_axes(with_trials(sweep, trials))}
    assert [found["seed"].height(trial) for trial in trials] == [0.0, 0.5, 1.0]
    assert sorted(found["lr"].height(trial) for trial in trials) == [0.0, 1.0, 1.0]
    assert found["of"].words == ["x" * 40 + str(seed) for seed in seeds]
    drawn = parallel(with_trials(sweep, trials))
    assert drawn is not None
    axes = {y["title"]: y["axis"] for layer in chart.spec(drawn)["layer"] if (y := layer["encoding"]["y"]).get("title")}
    assert axes["seed"]["values"] == seeds  # no ticks between them, which would have the same texts
    assert axes["seed"]["format"] == "d" and axes["lr"]["format"] == ".4~g"  # .4~g would write each as 2.024e+7


def test_outlier_of_an_objective_stands_at_the_lower_end(sweep: SweepResults) -> None:
    accuracies = [90.0, 91.0, 92.0, 93.0, 94.0, 95.0, 96.0, 10.0]
    trials = [
        replace(sweep.trials[0], id=f"{n:04d}", metrics={"top1": top1, "size_bytes": 1.0})
        for n, top1 in enumerate(accuracies)
    ]
    axis = parallel_axes(with_trials(sweep, trials))[-1]
    assert axis.label == "val top-1 %" and axis.bottom > 70
    assert axis.height(trials[-1]) == 0.0 < axis.height(trials[0]) < axis.height(trials[6]) == 1.0


def test_each_axis_of_the_chart_is_one_of_the_library(sweep: SweepResults) -> None:
    drawn = parallel(sweep)
    assert drawn is not None
    axes = [y for layer in chart.spec(drawn)["layer"] if (y := layer["encoding"]["y"]).get("title")]
    assert [axis["title"] for axis in axes] == ["widths, mean", "val top-1 %", "size, kB"]
    assert [axis["scale"]["domain"] for axis in axes] == [[2.0, 4.0], [70.0, 96.5], [8.0, 4.0]]


def test_equal_trials_have_no_parallel_coordinates(sweep: SweepResults) -> None:
    assert parallel(with_trials(sweep, sweep.trials[:1])) is None


@pytest.mark.parametrize("accuracies", [[90.0] * 8 + [50.0], [90.0] * 9 + [90.5], [91.0] * 8 + [50.0, 40.0]])
def test_an_objective_in_which_most_are_as_good_as_the_best_has_an_axis(
    sweep: SweepResults, accuracies: list[float]
) -> None:
    trials = [
        replace(sweep.trials[0], id=f"{n:04d}", metrics={"top1": top1, "size_bytes": 1.0})
        for n, top1 in enumerate(accuracies)
    ]
    axis = parallel_axes(with_trials(sweep, trials))[-1]
    heights = [axis.height(trial) for trial in trials]
    assert axis.bottom < axis.top == max(accuracies)
    assert (min(heights), max(heights)) == (0.0, 1.0)
