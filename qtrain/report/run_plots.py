"""Pictures of runs: accuracy against what a model costs, and the curves of one run's training."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import altair as alt
import numpy as np

from qtrain.pipeline.summary import CALIBRATED, DISTILLED, FLOAT, TRAINED
from qtrain.report import chart
from qtrain.report.scatter import POINTS, Mark, Scatter, ScatterPoint, y_limits
from qtrain.report.seed_groups import SeedGroup

WORDS = {CALIBRATED: "calibrated only", TRAINED: "trained without teacher", DISTILLED: "trained with teacher"}
SIGNS = {
    CALIBRATED: Mark("cross", size=6, opacity=0.7),
    TRAINED: Mark("ring", line="dashed"),
    DISTILLED: Mark("dot", line="solid"),
}

ACCURACIES = {"top1": "top-1", "agreement": "agreement with the teacher"}
"""The last part of a metric's name -> what its curve is called: metrics in percent."""

NO_LOSS = ("lr", "images_per_s")
OF_PARTS = (
    "bits scale error zeros dead clipped negative gradient oscillating flipped instability balance inundation lr"
).split()
"""The first part of the names of metrics that are of one layer, term or group of parameters, such as
``zeros/conv1.weight``: no losses either. ``w4/hard`` and ``teacher/hard`` are losses."""

SHAPES = (
    {CALIBRATED: "cross", TRAINED: "ring", DISTILLED: "dot"},
    {CALIBRATED: "saltire", TRAINED: "frame", DISTILLED: "diamond"},
    {CALIBRATED: "bar", TRAINED: "box", DISTILLED: "square"},
    {CALIBRATED: "pillar", TRAINED: "delta", DISTILLED: "up"},
)
"""Where there are more models than colors, those of one color have other shapes."""

NEAR, FAR = 30.0, 3.0
"""Points below the best accuracy of a model, and times its distance to the median."""

Curve = list[tuple[float, float]]


@dataclass(frozen=True)
class CostAxis:
    """What is drawn from left to right, cheaper models to the right."""

    label: str
    value: Callable[[SeedGroup], float]


COMPRESSION = CostAxis("compression: times smaller than full precision", lambda group: group.compression)
BIT_OPERATIONS = CostAxis("bit operations saved: times fewer than full precision", lambda group: group.bops_saved)


def accuracy_scatter(groups: Iterable[SeedGroup], axis: CostAxis) -> Scatter | None:
    """All rows of the closing table: color tells models apart, the sign tells how a model was trained.

    ``None`` where no row has a place: full precision is a line, and any other row may not know its cost.

    A filled point was trained with a teacher, an open one without, a cross was only calibrated. Full precision is a
    horizontal line. Each bit width is named at its best point. Lines join the best point of each bit width, by model
    and training, since others differ in more than their bits. What lies far below the others, as a model that
    collapsed to chance, is at the lower edge with its accuracy.
    """
    rows = list(groups)
    placed = [row for row in rows if row.key.way != FLOAT and math.isfinite(axis.value(row)) and axis.value(row) > 0]
    if not placed:
        return None
    models = list(dict.fromkeys(_model(row, placed) for row in placed))
    low, high, floor = y_limits(_important(rows), (row.top1 for row in placed), resolution=POINTS)
    best: dict[tuple[str, str], SeedGroup] = {}
    best_of_way: dict[tuple[str, str, str], SeedGroup] = {}
    for row in sorted(placed, key=lambda row: row.top1):
        best[_model(row, placed), row.key.bits] = row
        best_of_way[_model(row, placed), row.key.bits, row.key.way] = row
    marks = {
        _kind(model, way, models): replace(
            sign, shape=SHAPES[place // len(chart.CSS_COLORS) % len(SHAPES)][way], color=place
        )
        for place, model in enumerate(models)
        for way, sign in SIGNS.items()
    }
    points = []
    for row in placed:
        model = _model(row, placed)
        label = row.key.bits if best[model, row.key.bits] is row else ""
        if row.top1 < floor:
            label = f"{label} {row.top1:.1f} %".strip()
        tip = f"{model} {row.key.bits}\n{WORDS[row.key.way]} {row.key.terms}\n{row.top1:.2f} %, {axis.value(row):.3g}x"
        joined = row.top1 >= floor and best_of_way[model, row.key.bits, row.key.way] is row
        kind = _kind(model, row.key.way, models)
        points.append(ScatterPoint(axis.value(row), max(row.top1, floor), kind, label, tip, joined=joined))
    references = []
    floats = [row for row in rows if row.key.way == FLOAT]
    for row in floats:
        own = {_model(other, placed) for other in placed if other.key[:2] == row.key[:2]}
        name = f"{_model(row, floats)}: " if len(floats) > 1 else ""
        color = models.index(next(iter(own))) if len(own) == 1 else None
        references.append((row.top1, f"{name}full precision {row.top1:.2f} %", color))
    return Scatter(
        x=axis.label, y="top-1 accuracy, %", points=points, marks=marks, y_range=(low, high), references=references,
        suffix="x",
    )  # fmt: skip


def curves(rows: Iterable[Mapping[str, float | str]]) -> dict[str, dict[str, Curve]]:
    """Title -> name of a curve -> its (optimizer step, value), from the rows of a run's ``metrics.jsonl``.

    Losses, accuracies, how the scale of each layer's weight moved, and relative errors of quantization; a chart in
    which no curve has two points is left out.
    """
    series: dict[tuple[str, str], Curve] = {}
    for row in rows:
        for name, value in row.items():
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if number and name not in ("step", "epoch", "time", "split"):
                series.setdefault((str(row.get("split", "")), name), []).append((float(row["step"]), float(value)))
    losses, accuracies, scales, errors = "Loss", "Accuracy, %", "Weight scale by its first value", "Relative error"
    found: dict[str, dict[str, Curve]] = {losses: {}, accuracies: {}, scales: {}, errors: {}}
    for (split, name), points in series.items():
        if name.startswith("scale/") and name.endswith(".weight") and points[0][1]:
            own = name[len("scale/") : -len(".weight")]
            found[scales][own] = [(x, y / points[0][1]) for x, y in points]
        elif name.startswith("error/"):
            found[errors][name[len("error/") :]] = points
        elif name.partition("/")[0] in OF_PARTS and "/" in name:
            continue
        elif (said := ACCURACIES.get(name.rpartition("/")[2])) is not None:
            found[accuracies][" ".join([split, *name.split("/")[:-1], said])] = points
        elif name not in NO_LOSS:
            found[losses][f"{split} {name}"] = points
    return {title: lines for title, lines in found.items() if any(len(points) > 1 for points in lines.values())}


def thin(points: Curve, most: int) -> Curve:
    """At most ``most`` points (two or more), each the mean of as many neighbors; the last is kept as it is.

    >>> thin([(0.0, 1.0), (1.0, 3.0), (2.0, 5.0), (3.0, 7.0), (4.0, 0.0)], most=3)
    [(0.5, 2.0), (2.5, 6.0), (4.0, 0.0)]
    """
    if len(points) <= most:
        return points
    groups = np.array_split(np.array(points[:-1]), most - 1)
    return [*((float(x), float(y)) for x, y in (group.mean(axis=0) for group in groups)), points[-1]]


def curves_chart(lines: Mapping[str, Curve], *, most: int) -> alt.TopLevelMixin:
    """``lines`` by optimizer step, each of at most ``most`` points; a click on the legend leaves one curve in color.

    The legend says the last value of each curve. A curve of a single point is a dot.
    """
    rows: list[dict[str, Any]] = []
    for name, points in lines.items():
        xs, ys = zip(*thin(points, most), strict=True)
        values = [float(f"{y:.4g}") for y in ys]
        label = f"{name} {values[-1]:g}"
        rows.append({"line": label, "step": [round(x) for x in xs], "value": values, "single": len(xs) == 1})
    names = [row["line"] for row in rows]
    colors = [chart.CSS_COLORS[place % len(chart.CSS_COLORS)] for place in range(len(names))]
    picked = alt.selection_point(fields=["line"], bind="legend")
    base = (
        alt.Chart(alt.InlineData(values=rows))
        .transform_flatten(["step", "value"])
        .encode(
            x=alt.X("step:Q", title="optimizer step", scale=alt.Scale(nice=False), axis=alt.Axis(grid=False)),
            y=alt.Y("value:Q", title=None, scale=alt.Scale(zero=False)),
            color=alt.Color(
                "line:N", title=None, scale=alt.Scale(domain=names, range=colors), legend=alt.Legend(columns=2)
            ),
            opacity=alt.condition(picked, alt.value(0.85), alt.value(0.1)),
            tooltip="line:N",
        )
    )
    dots = base.transform_filter("datum.single").mark_point(filled=True, size=50)
    return alt.layer(base.mark_line(strokeWidth=1.5).add_params(picked), dots).properties(width="container", height=190)


def _important(rows: Sequence[SeedGroup]) -> list[float]:
    """The accuracies that the limits of the plot show in full: of each model full precision, and the best students.

    A student that was trained counts if it lies below the best of its model by at most :data:`NEAR`, or :data:`FAR`
    times as much as the median does.
    """
    shown = [row for row in rows if row.key.way != CALIBRATED] or rows
    by_model: dict[tuple[str, str], list[SeedGroup]] = {}
    for row in shown:
        by_model.setdefault((row.key.dataset, row.key.model), []).append(row)
    found = []
    for same in by_model.values():
        best = max(row.top1 for row in same)
        least = best - max(NEAR, FAR * (best - median(row.top1 for row in same)))
        found += [row.top1 for row in same if row.top1 >= least or row.key.way == FLOAT]
    return found


def _kind(model: str, way: str, models: list[str]) -> str:
    return f"{model}, {WORDS[way]}" if len(models) > 1 else WORDS[way]


def _model(row: SeedGroup, among: list[SeedGroup]) -> str:
    """The model, with data set and quantizer where the rows ``among`` which it stands differ in them."""
    several = [len({getattr(other.key, part) for other in among}) > 1 for part in ("dataset", "quantizer")]
    parts = (row.key.dataset if several[0] else "", row.key.model, row.key.quantizer if several[1] else "")
    return " ".join(part for part in parts if part)
