"""A scatter plot as a chart and as a figure: both show the same points."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from qtrain.report import chart, figure
from qtrain.report.scatter import Mark, Scatter, ScatterPoint, draw_scatter, y_limits

SCATTER = Scatter(
    x="size, kB",
    y="accuracy, %",
    points=[
        ScatterPoint(2.0, 60.0, "open", "a"),
        ScatterPoint(8.0, 90.0, "filled", "b", trial=7),
        ScatterPoint(16.0, 95.0, "filled"),
    ],
    marks={"unused": Mark("cross"), "open": Mark("ring"), "filled": Mark("dot", size=9, color=0, line="dashed")},
    y_range=(55.0, 99.0),
    stairs=[(2.0, 60.0), (8.0, 90.0), (16.0, 95.0)],
    references=[(97.0, "full precision", 1)],
    suffix="x",
)


def test_chart_holds_points_and_legend_of_the_kinds_that_are_there() -> None:
    made = chart.spec(draw_scatter(SCATTER)[0])
    (points,) = (layer for layer in made["layer"] if layer["mark"]["type"] == "point")
    rows = made["datasets"][points["data"]["name"]]
    assert [(row["x"], row["y"], row["kind"], row["trial"]) for row in rows] == [
        (2.0, 60.0, "open", -1), (8.0, 90.0, "filled", 7), (16.0, 95.0, "filled", -1)
    ]  # fmt: skip
    scale = points["encoding"]["fill"]["scale"]
    assert (scale["domain"], scale["range"]) == (["open", "filled"], [chart.INK, chart.CSS_COLORS[0]])
    assert made["layer"][0]["encoding"]["x"]["scale"]["type"] == "log"
    (line,) = (layer for layer in made["layer"] if "strokeDash" in layer["mark"] and layer["mark"]["type"] == "line")
    assert made["datasets"][line["data"]["name"]] == [{"x": 8.0, "y": 90.0}, {"x": 16.0, "y": 95.0}]


def test_figure_has_points_stairs_labels_and_legend() -> None:
    (axes,) = draw_scatter(SCATTER)[1].axes
    lines = {str(line.get_label()): line for line in axes.get_lines()}
    assert [tuple(point) for point in lines["filled"].get_xydata()] == [(8.0, 90.0), (16.0, 95.0)]
    assert lines["filled"].get_linestyle() == "--" and lines["open"].get_markerfacecolor() == "none"
    assert axes.get_lines()[0].get_drawstyle() == "steps-post" and axes.get_xscale() == "log"
    assert {text.get_text() for text in axes.texts} >= {"a", "b", "full precision"}
    legend = axes.get_legend()
    assert legend is not None and [text.get_text() for text in legend.get_texts()] == ["open", "filled"]


def test_png_is_1200_by_750_in_the_colors_of_its_marks() -> None:
    buffer = BytesIO()
    draw_scatter(SCATTER)[1].savefig(buffer, format="png")
    image = Image.open(buffer).convert("RGB")
    assert image.size == (1200, 750)
    for color in (figure.BACKGROUND, figure.COLORS[0], figure.COLORS[1]):
        wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.asarray(image) == wanted).all(axis=-1).sum() > 50


@pytest.mark.parametrize(("others", "floor"), [([70.0, 80.0], 78.0), ([88.0], 88.0), ([], 90.0)])
def test_limits_reach_a_part_of_the_height_below_the_important_points(others: list[float], floor: float) -> None:
    """Important values span 30 points, from 90 to 120; 0.4 of that is shown below them."""
    low, high, lowest = y_limits([90.0, 120.0], others)
    assert lowest == pytest.approx(floor) and low < floor and high > 120


def test_narrow_costs_are_on_a_linear_axis_and_a_single_point_has_room() -> None:
    narrow = Scatter(x="", y="", points=[ScatterPoint(5.0, 1.0, "a")], marks={"a": Mark("dot")}, y_range=(0.0, 2.0))
    assert not narrow.logarithmic and narrow.x_range == pytest.approx((4.7, 5.3))
