"""A scatter plot as a chart."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal, TypedDict

import altair as alt

from qtrain.report import chart
from qtrain.report.scatter import Scatter, css_color
from qtrain.report.scatter_labels import placed_labels, reference_labels

RING = "M-1,0A1,1,0,1,1,1,0A1,1,0,1,1,-1,0ZM-.7,0A.7,.7,0,1,0,.7,0A.7,.7,0,1,0,-.7,0Z"
FRAME = "M0,-1L1,0L0,1L-1,0ZM0,-.75L-.75,0L0,.75L.75,0Z"
BOX = "M-.9,-.9H.9V.9H-.9ZM-.62,-.62V.62H.62V-.62Z"
DELTA = "M0,-1L1,.8L-1,.8ZM0,-.42L-.52,.52L.52,.52Z"
SALTIRE = "M-.9,-.55L-.55,-.9L0,-.35L.55,-.9L.9,-.55L.35,0L.9,.55L.55,.9L0,.35L-.55,.9L-.9,.55L-.35,0Z"
"""Symbols of Vega: an open circle, diamond, square and triangle, and a cross that leans."""

SHAPES = {
    "dot": "circle", "diamond": "diamond", "square": "square", "up": "triangle-up", "down": "triangle-down",
    "ring": RING, "frame": FRAME, "box": BOX, "delta": DELTA,
    "cross": "cross", "saltire": SALTIRE, "bar": "M-1,-.3H1V.3H-1Z", "pillar": "M-.3,-1H.3V1H-.3Z",
}  # fmt: skip
"""Shape -> the symbol of Vega."""

DASHES = ([2, 3], [8, 3], [8, 3, 2, 3], [14, 4])
"""Of references, by how often their colors have begun again."""


class _ByKind(TypedDict):
    """How a channel of a chart follows the kind of a point."""

    field: str
    type: Literal["nominal"]
    title: None
    scale: alt.Scale
    legend: alt.Legend


def draw_scatter(scatter: Scatter) -> alt.TopLevelMixin:
    """``scatter`` with a tip for each point, and a thick edge around the trial that is chosen."""
    x_scale = alt.Scale(domain=scatter.x_range, nice=False, type="log" if scatter.logarithmic else "linear")
    x = alt.X("x:Q", title=scatter.x, scale=x_scale, axis=_x_axis(scatter))
    y = alt.Y("y:Q", title=scatter.y, scale=alt.Scale(domain=sorted(scatter.y_range), nice=False, zero=False))
    rows = [
        {**asdict(point), "size": (2 * mark.radius) ** 2, "opacity": mark.opacity, "color": css_color(mark.color)}
        for kind, mark in scatter.marks.items()
        for point in scatter.points
        if point.kind == kind
    ]
    base = alt.Chart(_data(rows)).encode(x, y)
    marks = [scatter.marks[kind] for kind in scatter.present]
    layers: list[Any] = [
        alt.Chart(_data([{"x": a, "y": b} for a, b in scatter.stairs]))
        .mark_line(
            interpolate="step-after" if scatter.level_first else "step-before", color=chart.CSS_COLORS[0], opacity=0.5
        )
        .encode(x, y)
    ]
    for value, _, color in scatter.references:
        dash = DASHES[(color or 0) // len(chart.CSS_COLORS) % len(DASHES)]
        row = alt.Chart(_data([{"y": value}])).encode(y)
        layers.append(row.mark_rule(strokeDash=dash, color=css_color(color)))
    layers += _reference_texts(scatter, y)
    for kind, mark in zip(scatter.present, marks, strict=True):
        if mark.line:
            dash = [1, 0] if mark.line == "solid" else [5, 4]
            line = alt.Chart(_data([{"x": a, "y": b} for a, b in scatter.joined(kind)])).encode(x, y)
            layers.append(line.mark_line(strokeDash=dash, color=css_color(mark.color)))

    def by_kind(values: list[str]) -> _ByKind:
        scale = alt.Scale(domain=scatter.present, range=values)
        return {"field": "kind", "type": "nominal", "title": None, "scale": scale, "legend": alt.Legend(columns=3)}

    edge: dict[str, Any] = {"condition": {"test": chart.CHOSEN, "value": chart.CSS_COLORS[1]}, "value": "transparent"}
    layers.append(
        base.mark_point(filled=True, strokeWidth=3).encode(
            shape=alt.Shape(**by_kind([SHAPES[mark.shape] for mark in marks])),
            fill=alt.Fill(**by_kind([css_color(mark.color) for mark in marks])),
            size=alt.Size("size:Q", scale=None),
            opacity=alt.Opacity("opacity:Q", scale=None),
            stroke=alt.Stroke(**edge),
            tooltip="tip:N",
        )
    )
    labels = alt.Chart(_data(placed_labels(scatter))).encode(x, y).mark_text(fontSize=11)
    layers.append(labels.encode(text="label:N", color=alt.Color("color:N", scale=None)))
    return alt.layer(*layers).properties(width="container", height=330)


def _reference_texts(scatter: Scatter, y: alt.Y) -> list[alt.Chart]:
    """The texts, each over its own halo, since lines of other references may pass below it."""
    texts = []
    for label in reference_labels(scatter):
        side: Any = {"align": "left", "dx": 4} if label.left else {"align": "right", "dx": -4}
        row = alt.Chart(_data([{"y": label.y, "text": label.text}]))
        row = row.encode(y, x=alt.value(0) if label.left else alt.value("width"), text="text:N")
        halo = row.mark_text(stroke=chart.BACKGROUND, strokeWidth=4, color=chart.BACKGROUND, **side)
        texts += [halo, row.mark_text(color=css_color(label.color), **side)]
    return texts


def _x_axis(scatter: Scatter) -> alt.Axis:
    return alt.Axis(labelExpr=f"format(datum.value, '.4~g') + '{scatter.suffix}'", labelOverlap=True)


def _data(rows: Sequence[Mapping[str, object]]) -> alt.InlineData:
    return alt.InlineData(values=rows)
