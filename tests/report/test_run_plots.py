"""Pictures of runs: accuracy against cost, and training curves."""

from __future__ import annotations

import doctest
from typing import Any

import pytest
import vl_convert

from qtrain.pipeline.summary import RunSummary
from qtrain.report import chart, run_plots
from qtrain.report.run_plots import BIT_OPERATIONS, COMPRESSION, CostAxis, accuracy_scatter, curves, curves_chart, thin
from qtrain.report.scatter import Scatter
from qtrain.report.scatter_chart import SHAPES, draw_scatter
from qtrain.report.seed_groups import seed_groups

WITH, WITHOUT, ONLY = "trained with teacher", "trained without teacher", "calibrated only"


def run(bits: int = 4, distill: str = "none", top1: float = 95.0, **changes: Any) -> RunSummary:
    fields: dict[str, Any] = dict(
        dataset="digits", model="resnet8", quantizer="lsq", w_bits=bits, a_bits=bits, distill=distill, seed=0, epochs=3,
        top1=top1, fp_top1=97.5, ptq_top1=None, compression=32 / bits, bops=700 * bits * bits, fp_bops=700 * 1024,
    )  # fmt: skip
    return RunSummary(**(fields | changes))


def scatter_of(runs: list[RunSummary], axis: CostAxis = COMPRESSION) -> Scatter:
    found = accuracy_scatter(seed_groups(runs), axis)
    assert found is not None
    return found


def row(step: int, split: str, **values: Any) -> dict[str, Any]:
    return {"step": step, "epoch": 0, "time": 1.0, "split": split, **values}


def test_distilled_points_are_filled_and_others_open() -> None:
    scatter = scatter_of([run(distill="soft", top1=96.0), run()])
    assert {(point.kind, point.x, point.y) for point in scatter.points} == {(WITH, 8.0, 96.0), (WITHOUT, 8.0, 95.0)}
    marks = {kind: (scatter.marks[kind].shape, scatter.marks[kind].line) for kind in scatter.present}
    assert marks == {WITH: ("dot", "solid"), WITHOUT: ("ring", "dashed")}


def test_costs_are_times_less_than_full_precision() -> None:
    runs = [run(bits=8), run(bits=2, bops=None)]
    assert sorted(point.x for point in scatter_of(runs).points) == [4.0, 16.0]
    assert [point.x for point in scatter_of(runs, BIT_OPERATIONS).points] == [16.0]  # the other is unknown


def test_each_bit_width_is_named_once_at_its_best_point() -> None:
    scatter = scatter_of([run(distill="soft", top1=96.0), run()])
    assert {point.kind: point.label for point in scatter.points} == {WITH: "W4A4", WITHOUT: ""}


def test_accuracies_of_zero_are_told_apart_by_hundredths() -> None:
    scatter = scatter_of([run(top1=0.0, fp_top1=0.0)])
    assert scatter.y_range == pytest.approx((-0.0008, 0.0016))


def test_lines_join_the_best_point_of_each_bit_width() -> None:
    """Recipes of one model and way: the worse of two is beside the line, and so is one that collapsed."""
    runs = [
        run(8, top1=96.0, name="slow", recipe_hash="a"), run(8, top1=97.0, name="fast", recipe_hash="b"),
        run(4, top1=95.0, name="slow", recipe_hash="c"), run(4, top1=92.0, name="fast", recipe_hash="d"),
        run(2, top1=10.0, name="slow", recipe_hash="e"), run(8, "soft", top1=96.5), run(4, "hint", top1=97.0),
    ]  # fmt: skip
    scatter = scatter_of(runs)
    assert len(scatter.points) == 7
    assert scatter.joined(WITHOUT) == [(4.0, 97.0), (8.0, 95.0)]
    assert scatter.joined(WITH) == [(4.0, 96.5), (8.0, 97.0)]


def test_collapsed_calibration_is_at_the_edge_with_its_value() -> None:
    scatter = scatter_of([run(ptq_top1=10.0), run(bits=2, top1=85.0)])
    (point,) = (point for point in scatter.points if point.kind == ONLY)
    assert point.label == "10.0 %" and 75 < scatter.y_range[0] < point.y < 85


def test_trained_run_that_collapsed_does_not_press_the_others_together() -> None:
    """Others of its model span 92.0 to 97.5; another model, whose students are as far down, is shown in full."""
    runs = [run(8, top1=97.0), run(4, top1=95.0), run(3, top1=92.0), run(2, top1=10.0)]
    scatter = scatter_of(runs)
    points = {point.x: point for point in scatter.points}
    assert scatter.y_range[0] > 85 and {points[x].y for x in (4.0, 8.0, 32 / 3)} == {97.0, 95.0, 92.0}
    assert (points[16.0].label, points[4.0].label) == ("W2A2 10.0 %", "W8A8")
    assert scatter.y_range[0] < points[16.0].y < 92
    small = [run(model="small", fp_top1=62.0, top1=60.0), run(8, model="small", fp_top1=62.0, top1=61.0)]
    scatter = scatter_of([*runs, *small])
    assert 10 < scatter.y_range[0] < 60 and {60.0, 61.0} <= {point.y for point in scatter.points}
    steep = scatter_of([run(4, top1=60.0), run(2, top1=30.0)])
    assert steep.y_range[0] < 30  # half of them are far below


def test_full_precision_is_a_reference_in_the_color_of_its_model() -> None:
    scatter = scatter_of([run(), run(model="resnet20", fp_top1=99.0)])
    assert set(scatter.references) == {
        (97.5, "resnet8: full precision 97.50 %", scatter.marks[f"resnet8, {WITHOUT}"].color),
        (99.0, "resnet20: full precision 99.00 %", scatter.marks[f"resnet20, {WITHOUT}"].color),
    }
    assert set(scatter.present) == {f"resnet8, {WITHOUT}", f"resnet20, {WITHOUT}"}


def test_more_models_than_colors_are_told_apart_by_their_shapes() -> None:
    """Twenty models of three ways: no two kinds have both color and shape alike, no two lines both color and dash."""
    ways: list[dict[str, Any]] = [{}, {"distill": "soft"}]
    runs = [
        run(model=f"m{n}", top1=90.0 + n / 10, ptq_top1=85.0, fp_top1=97 + n / 10, **w) for n in range(20) for w in ways
    ]
    scatter = scatter_of(runs)
    colors = len(chart.CSS_COLORS)
    assert len(scatter.present) == 60
    looks = {(scatter.marks[kind].shape, (scatter.marks[kind].color or 0) % colors) for kind in scatter.present}
    assert len(looks) == 60 and {shape for shape, _ in looks} <= SHAPES.keys()
    made = chart.spec(draw_scatter(scatter))
    rules = [layer["mark"] for layer in made["layer"] if layer["mark"]["type"] == "rule"]
    assert len({(rule["color"], tuple(rule["strokeDash"])) for rule in rules}) == len(rules) == 20


def test_losses_accuracies_scales_and_errors_get_a_chart_each() -> None:
    rows = [
        row(step, "train", hard=2.0 / step, total=3.0 / step, lr=0.1, images_per_s=99.0)
        | {"scale/conv1.weight": 0.5 * step, "error/conv1.input": 0.1 / step, "agreement": 30.0 * step}
        for step in (1, 2, 3)
    ]
    rows += [row(step, "val", loss=1.0, top1=10.0 * step) for step in (2, 3)] + [row(3, "test", top1=31.0, loss=None)]
    loss, accuracy, scale, error = curves(rows).values()
    assert list(loss) == ["train hard", "train total", "val loss"]
    assert list(accuracy) == ["train agreement with the teacher", "val top-1", "test top-1"]
    assert accuracy["test top-1"] == [(3.0, 31.0)]
    assert scale == {"conv1": [(1.0, 1.0), (2.0, 2.0), (3.0, 3.0)]} and list(error) == ["conv1.input"]


def test_metrics_of_each_width_are_drawn_and_those_of_layers_left_out() -> None:
    rows = [
        row(step, "train", **{"hard": 2.0, "w4/kl": 1.0, "teacher/hard": 3.0, "lr": 0.1, "lr/scales": 0.01})
        | {"zeros/w4.conv1.weight": 0.5, "balance/hard": 0.5, "bits/conv1.weight": 4.0, "w4/agreement": 50.0}
        for step in (1, 2)
    ]
    rows += [row(step, "val", **{"top1": 90.0, "w4/top1": 80.0 + step, "w2/top1": 30.0}) for step in (1, 2)]
    found = curves(rows)
    assert {title: list(lines) for title, lines in found.items()} == {
        "Loss": ["train hard", "train w4/kl", "train teacher/hard"],
        "Accuracy, %": ["train w4 agreement with the teacher", "val top-1", "val w4 top-1", "val w2 top-1"],
    }
    assert found["Accuracy, %"]["val w4 top-1"] == [(1.0, 81.0), (2.0, 82.0)]


def test_single_point_is_no_curve() -> None:
    assert curves([row(1, "test", top1=90.0)]) == {}


def test_chart_of_curves_has_all_lines_in_its_legend_with_their_last_values() -> None:
    layers = {f"layer{n}": [(float(step), n / step) for step in range(1, 9)] for n in range(1, 9)}
    made = chart.spec(curves_chart({**layers, "test": [(8.0, 0.5)]}, most=4))
    (rows,) = made["datasets"].values()
    assert [row["line"] for row in rows][:2] == ["layer1 0.125", "layer2 0.25"] and len(rows) == 9
    assert {len(row["value"]) for row in rows} == {4, 1} and [row["single"] for row in rows].count(True) == 1
    color = made["layer"][0]["encoding"]["color"]
    assert color["scale"]["domain"] == [row["line"] for row in rows] and color["legend"] is not None
    svg = vl_convert.vegalite_to_svg({**made, "config": chart.LOOK})
    assert all(f">{row['line']}<" in svg for row in rows)


def test_long_lines_are_averaged_and_keep_their_end() -> None:
    points = [(float(i), float(i % 2)) for i in range(10_001)]
    thinned = thin(points, most=240)
    assert len(thinned) == 240 and thinned[-1] == points[-1]
    assert all(0.4 < y < 0.6 for _, y in thinned[:-1])
    assert thin(points[:240], most=240) == points[:240]


def test_examples_in_docstrings_hold() -> None:
    result = doctest.testmod(run_plots)
    assert result.attempted > 0 and result.failed == 0


@pytest.mark.parametrize("axis", [COMPRESSION, BIT_OPERATIONS])
def test_runs_without_a_place_are_no_picture(axis: Any) -> None:
    assert accuracy_scatter(seed_groups([RunSummary(model="m", w_bits="mixed", top1=50.0)]), axis) is None
    assert accuracy_scatter(seed_groups([run(32, fp_top1=None)]), axis) is None
