"""Training curves: what is read, what is drawn, and where."""

from __future__ import annotations

from typing import Any

import pytest

from qtrain.report.curves import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Line, charts, draw, thin, ticks


def row(step: int, split: str, **values: Any) -> dict[str, Any]:
    return {"step": step, "epoch": 0, "time": 1.0, "split": split, **values}


def test_losses_accuracies_and_scales_get_a_chart_each() -> None:
    rows = [
        row(step, "train", hard=2.0 / step, total=3.0 / step, lr=0.1, images_per_s=99.0)
        | {"scale/conv1.weight": 0.5 * step, "error/conv1.input": 0.1 / step, "agreement": 30.0 * step}
        for step in (1, 2, 3)
    ]
    rows += [row(step, "val", loss=1.0, top1=10.0 * step) for step in (2, 3)] + [row(3, "test", top1=31.0, loss=None)]
    loss, accuracy, scale, error = charts(rows)
    assert [line.label for line in loss.lines] == ["train hard", "train total", "val loss"]
    assert [(line.label, line.last) for line in accuracy.lines] == [
        ("train agreement with the teacher", "90"), ("val top-1", "30"), ("test top-1", "31")
    ]  # fmt: skip
    assert accuracy.lines[2].dot is not None and accuracy.lines[1].dot is None
    assert [(line.label, line.last) for line in scale.lines] == [("conv1", "3")] and not scale.legend
    assert [(line.label, line.last) for line in error.lines] == [("conv1.input", "0.03333")] and not error.legend


def test_a_single_point_is_no_curve() -> None:
    assert charts([row(1, "test", top1=90.0)]) == []
    assert draw("Loss", []) is None


def test_the_geometry_fills_the_plot() -> None:
    chart = draw("Loss", [Line("train", [(0.0, 4.0), (10.0, 2.0)])])
    assert chart is not None
    (x0, y0), (x1, y1) = [tuple(map(float, point.split())) for point in chart.lines[0].path[1:].split("L")]
    assert (x0, x1) == (LEFT, WIDTH - RIGHT)
    assert TOP < y0 < y1 < HEIGHT - BOTTOM  # the higher loss is drawn higher
    assert [text for _, text in chart.x_ticks] == ["0", "2", "4", "6", "8", "10"]


@pytest.mark.parametrize("values", [(3.0, 3.0), (0.0, 0.0), (-2.0, -2.0)])
def test_a_constant_is_drawn(values: tuple[float, float]) -> None:
    chart = draw("Loss", [Line("train", list(enumerate(values)))])
    assert chart is not None and chart.y_ticks


def test_long_lines_are_averaged_and_keep_their_end() -> None:
    points = [(float(i), float(i % 2)) for i in range(10_001)]
    thinned = thin(points)
    assert len(thinned) <= 240 and thinned[-1] == points[-1]
    assert all(0.4 < y < 0.6 for _, y in thinned[:-1])
    assert thin(points[:240]) == points[:240]


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0.0, 100.0) == [0.0, 20.0, 40.0, 60.0, 80.0, 100.0]
    assert ticks(0.93, 1.08) == [0.95, 1.0, 1.05]
    assert ticks(-0.013, 0.0042) == [-0.01, -0.005, 0.0]
