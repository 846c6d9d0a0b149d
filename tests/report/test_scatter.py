"""A scatter plot as a chart and as a figure: both show the same points."""

from __future__ import annotations

from itertools import combinations

import pytest

from qtrain.report import chart
from qtrain.report.scatter import PLOT, Mark, Scatter, ScatterPoint, y_limits
from qtrain.report.scatter_chart import draw_scatter
from qtrain.report.scatter_labels import placed_labels, reference_labels

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
    made = chart.spec(draw_scatter(SCATTER))
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


def test_chart_has_stairs_references_and_labels() -> None:
    made = chart.spec(draw_scatter(SCATTER))
    stairs, rule, halo, reference, *_, labels = made["layer"]
    assert stairs["mark"]["interpolate"] == "step-after" and rule["mark"]["type"] == "rule"
    (row,) = made["datasets"][reference["data"]["name"]]
    assert row["text"] == "full precision" and 97.0 < row["y"] < 99.0  # above its line
    assert made["datasets"][rule["data"]["name"]] == [{"y": 97.0}]
    assert halo["mark"]["stroke"] == halo["mark"]["color"] == chart.BACKGROUND
    assert [row["label"] for row in made["datasets"][labels["data"]["name"]]] == ["a", "b"]


def test_labels_keep_clear_of_each_other_and_of_the_points() -> None:
    points = [ScatterPoint(5.0 + 0.25 * i, 5.0 + 0.15 * i, "a", f"W{i}A{i}") for i in range(6)]
    crowd = [*points, ScatterPoint(1.0, 1.0, "a"), ScatterPoint(10.0, 10.0, "a", "corner")]
    for suffix in ([], [ScatterPoint(0.5, 5.0, "a")]):  # a linear axis, and a logarithmic one
        scatter = Scatter(x="", y="", points=[*crowd, *suffix], marks={"a": Mark("dot", size=6)}, y_range=(0.0, 10.5))
        rows = placed_labels(scatter)
        boxes = []
        for row in rows:
            x, y = scatter.place(float(str(row["x"])), float(str(row["y"])))
            half = 3.3 * len(str(row["label"]))
            boxes.append((x - half, y - 6, x + half, y + 6))
        assert len(boxes) == 7
        for one, other in combinations(boxes, 2):
            assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
        for box in boxes:
            assert box[0] >= 0 and box[2] <= PLOT[0] and box[1] >= 0 and box[3] <= PLOT[1]
            for point in scatter.points:
                x, y = scatter.place(point.x, point.y)
                assert not (box[0] < x < box[2] and box[1] < y < box[3])


def test_texts_of_references_keep_clear_of_each_other_and_of_points() -> None:
    """Nine within 2.4 points of each other; the best point is to the right, but the left end is full of points."""
    crowd = [ScatterPoint(1.0 + 0.1 * i, 90.0 + 0.3 * i, "a") for i in range(9)]
    scatter = Scatter(
        x="", y="", points=[*crowd, ScatterPoint(3.0, 95.0, "a", "best")], marks={"a": Mark("dot", size=6)},
        y_range=(80.0, 96.0), references=[(90.0 + 0.3 * i, f"model {i}", i) for i in range(9)],
    )  # fmt: skip
    labels = reference_labels(scatter)
    assert scatter.text_left and not any(label.left for label in labels)
    assert [label.text for label in labels] == [f"model {i}" for i in range(9)]
    for one, other in combinations([label.box for label in labels], 2):
        assert one[3] <= other[1] + 1e-9
    assert all(label.box[1] >= 0 and label.box[3] <= PLOT[1] for label in labels)
    for label in labels:
        assert scatter.place(1.0, label.y)[1] == pytest.approx((label.box[1] + label.box[3]) / 2)
        for point in scatter.points:
            x, y = scatter.place(point.x, point.y)
            assert not (label.box[0] < x < label.box[2] and label.box[1] < y < label.box[3])


def test_labels_of_points_in_one_place_do_not_overlap() -> None:
    """As of several models that are drawn at the floor, in the corner of the plot."""
    same = [ScatterPoint(9.0, 0.3, "a", f"W2A2 {n}0.0 %") for n in range(4)]
    scatter = Scatter(
        x="", y="", points=[ScatterPoint(1.0, 9.0, "a"), *same], marks={"a": Mark("dot", size=6)}, y_range=(0.0, 10.0)
    )
    rows = placed_labels(scatter)
    places = [scatter.place(float(str(row["x"])), float(str(row["y"]))) for row in rows]
    half = 3.3 * len(str(rows[0]["label"]))
    for (x, y), (other_x, other_y) in combinations(places, 2):
        assert abs(x - other_x) >= 2 * half - 1e-6 or abs(y - other_y) >= 12 - 1e-6


def test_place_and_its_inverse_agree() -> None:
    for point in SCATTER.points:
        assert SCATTER.at(*SCATTER.place(point.x, point.y)) == pytest.approx((point.x, point.y))


@pytest.mark.parametrize(("others", "floor"), [([70.0, 80.0], 78.0), ([88.0], 88.0), ([], 90.0)])
def test_limits_reach_a_part_of_the_height_below_the_important_points(others: list[float], floor: float) -> None:
    """Important values span 30 points, from 90 to 120; 0.4 of that is shown below them."""
    low, high, lowest = y_limits([90.0, 120.0], others)
    assert lowest == pytest.approx(floor) and low < floor and high > 120


@pytest.mark.parametrize(("values", "resolution", "height"), [
    ([0.0, 0.0], 0.01, 0.01), ([0.0], 0.0, 1.0), ([1e-4, 3e-4], 0.0, 2e-4), ([90.0], 0.01, 1.8)
])  # fmt: skip
def test_limits_of_equal_values_leave_room_for_what_can_be_told_apart(
    values: list[float], resolution: float, height: float
) -> None:
    """The height of the values, with 0.08 of it below and 0.16 above."""
    low, high, floor = y_limits(values, [], resolution=resolution)
    assert (low, high) == pytest.approx((floor - 0.08 * height, max(values) + 0.16 * height))


def test_narrow_costs_are_on_a_linear_axis_and_a_single_point_has_room() -> None:
    narrow = Scatter(x="", y="", points=[ScatterPoint(5.0, 1.0, "a")], marks={"a": Mark("dot")}, y_range=(0.0, 2.0))
    assert not narrow.logarithmic and narrow.x_range == pytest.approx((4.7, 5.3))
