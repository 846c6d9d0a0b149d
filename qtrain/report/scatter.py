"""Accuracy against a cost, once as data, drawn as a chart for the page and as a figure for a PNG."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypedDict

import altair as alt
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from qtrain.report import chart, figure

LOGARITHMIC = 3.0
"""A cost axis is logarithmic where its largest value is so many times its smallest."""

REACH = 0.4
"""The plot extends below its lowest important point by this part of the height of all important points."""

RING = "M-1,0A1,1,0,1,1,1,0A1,1,0,1,1,-1,0ZM-.7,0A.7,.7,0,1,0,.7,0A.7,.7,0,1,0,-.7,0Z"
FRAME = "M0,-1L1,0L0,1L-1,0ZM0,-.75L-.75,0L0,.75L.75,0Z"
"""Symbols of Vega for an open circle and an open diamond."""

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "dot": ("circle", {"marker": "o", "markeredgewidth": 0}),
    "ring": (RING, {"marker": "o", "markerfacecolor": "none", "markeredgewidth": 1.3}),
    "frame": (FRAME, {"marker": "D", "markerfacecolor": "none", "markeredgewidth": 1.5}),
    "cross": ("cross", {"marker": "x", "markeredgewidth": 1.6}),
    "down": ("triangle-down", {"marker": "v", "markeredgewidth": 0}),
    "up": ("triangle-up", {"marker": "^", "markeredgewidth": 0}),
}
"""Shape -> the symbol of Vega, and the marker of matplotlib."""


@dataclass(frozen=True)
class Mark:
    """How points of one kind look. ``color`` is a place in the series' colors, ``None`` the text's color.

    ``size`` is a diameter in points. Points of a kind with a ``line`` are joined from left to right.
    """

    shape: str
    size: float = 8.0
    color: int | None = None
    opacity: float = 1.0
    line: str | None = None


@dataclass(frozen=True)
class ScatterPoint:
    """``kind`` names the point's mark, ``tip`` is what the page says of it, ``trial`` its number in a sweep."""

    x: float
    y: float
    kind: str
    label: str = ""
    tip: str = ""
    trial: int = -1


@dataclass(frozen=True)
class Scatter:
    """Points, the stairs that the best of them make, and horizontal references (value, text, color).

    ``marks`` are by kind, drawn in their order. ``stairs`` go level to the right and then up, with ``level_first``.
    """

    x: str
    y: str
    points: Sequence[ScatterPoint]
    marks: dict[str, Mark]
    y_range: tuple[float, float]
    stairs: Sequence[tuple[float, float]] = ()
    level_first: bool = True
    references: Sequence[tuple[float, str, int | None]] = ()
    suffix: str = ""
    """What stands behind each number of the cost axis."""

    present: list[str] = field(init=False)
    """Kinds that have points."""

    def __post_init__(self) -> None:
        kinds = {point.kind for point in self.points}
        object.__setattr__(self, "present", [kind for kind in self.marks if kind in kinds])

    @property
    def x_range(self) -> tuple[float, float]:
        xs = [point.x for point in self.points] or [1.0]
        if self.logarithmic:
            margin = (max(xs) / min(xs)) ** 0.06
            return min(xs) / margin, max(xs) * margin
        margin = 0.06 * (max(xs) - min(xs) or abs(max(xs)))
        return min(xs) - margin, max(xs) + margin

    @property
    def logarithmic(self) -> bool:
        xs = [point.x for point in self.points]
        return bool(xs) and min(xs) > 0 and max(xs) / min(xs) >= LOGARITHMIC

    @property
    def text_left(self) -> bool:
        """Whether references have their text at the left end, since the best point is in the right half."""
        low, high = self.x_range
        best = max(self.points, key=lambda point: point.y, default=None)
        middle = (low * high) ** 0.5 if self.logarithmic else (low + high) / 2
        return best is None or best.x > middle

    def joined(self, kind: str) -> list[tuple[float, float]]:
        return sorted((point.x, point.y) for point in self.points if point.kind == kind)


def y_limits(important: Iterable[float], others: Iterable[float]) -> tuple[float, float, float]:
    """(low, high, floor): the limits of the plot, and the lowest value that is drawn where it is.

    A model that collapsed to chance would press all others together; it is drawn at ``floor``.
    """
    ours = list(important)
    reach = max(max(ours) - min(ours), 0.02 * abs(max(ours)), 1e-9)
    floor = max(min([*ours, *others]), min(ours) - REACH * reach)
    return floor - 0.08 * reach, max(ours) + 0.16 * reach, floor


def draw_scatter(scatter: Scatter) -> chart.Picture:
    return _chart(scatter), _figure(scatter)


class _ByKind(TypedDict):
    """How a channel of a chart follows the kind of a point."""

    field: str
    type: Literal["nominal"]
    title: None
    scale: alt.Scale
    legend: alt.Legend


def _chart(scatter: Scatter) -> alt.TopLevelMixin:
    """``scatter`` for the page: a tip for each point, and a thick edge around the trial that is chosen."""
    x_scale = alt.Scale(domain=scatter.x_range, nice=False, type="log" if scatter.logarithmic else "linear")
    x = alt.X("x:Q", title=scatter.x, scale=x_scale, axis=_x_axis(scatter))
    y = alt.Y("y:Q", title=scatter.y, scale=alt.Scale(domain=sorted(scatter.y_range), nice=False, zero=False))
    rows = [
        {**asdict(point), "size": (1.4 * mark.size) ** 2, "opacity": mark.opacity, "color": _css(mark.color)}
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
    for value, text, color in scatter.references:
        row = alt.Chart(_data([{"y": value, "text": text}])).encode(y)
        layers.append(row.mark_rule(strokeDash=[2, 3], color=_css(color)))
        side: Any = {"align": "left", "dx": 4} if scatter.text_left else {"align": "right", "dx": -4}
        end = alt.value(0) if scatter.text_left else alt.value("width")
        layers.append(row.mark_text(dy=-7, color=_css(color), **side).encode(x=end, text="text:N"))
    for kind, mark in zip(scatter.present, marks, strict=True):
        if mark.line:
            dash = [1, 0] if mark.line == "solid" else [5, 4]
            line = alt.Chart(_data([{"x": a, "y": b} for a, b in scatter.joined(kind)])).encode(x, y)
            layers.append(line.mark_line(strokeDash=dash, color=_css(mark.color)))

    def by_kind(values: list[str]) -> _ByKind:
        scale = alt.Scale(domain=scatter.present, range=values)
        return {"field": "kind", "type": "nominal", "title": None, "scale": scale, "legend": alt.Legend(columns=3)}

    edge: dict[str, Any] = {"condition": {"test": chart.CHOSEN, "value": chart.CSS_COLORS[1]}, "value": "transparent"}
    layers.append(
        base.mark_point(filled=True, strokeWidth=3).encode(
            shape=alt.Shape(**by_kind([SHAPES[mark.shape][0] for mark in marks])),
            fill=alt.Fill(**by_kind([_css(mark.color) for mark in marks])),
            size=alt.Size("size:Q", scale=None),
            opacity=alt.Opacity("opacity:Q", scale=None),
            stroke=alt.Stroke(**edge),
            tooltip="tip:N",
        )
    )
    labels = base.transform_filter("datum.label").mark_text(dy=-12, fontSize=11)
    layers.append(labels.encode(text="label:N", color=alt.Color("color:N", scale=None)))
    return alt.layer(*layers).properties(width="container", height=330)


def _figure(scatter: Scatter) -> Figure:
    """``scatter`` for a PNG of 1200 x 750 pixels."""
    drawn = figure.new_figure()
    axes = drawn.add_subplot()
    figure.dress(axes, x=scatter.x, y=scatter.y)
    if scatter.logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(
            LogLocator(subs=(1, 2, 5) if scatter.x_range[1] > 8 * scatter.x_range[0] else "all")
        )
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}{scatter.suffix}"))
    axes.set_xlim(*scatter.x_range)
    axes.set_ylim(*sorted(scatter.y_range))
    if scatter.stairs:
        way = "steps-post" if scatter.level_first else "steps-pre"
        axes.plot(*zip(*scatter.stairs, strict=True), color=figure.COLORS[0], alpha=0.5, drawstyle=way)
    labels = []
    for kind in scatter.present:
        mark, color = scatter.marks[kind], _hex(scatter.marks[kind].color)
        line = {None: "None", "solid": "-", "dashed": "--"}[mark.line]
        style = SHAPES[mark.shape][1] | {"color": color, "alpha": mark.opacity, "markersize": mark.size}
        axes.plot(*zip(*scatter.joined(kind), strict=True), linestyle=line, label=kind, clip_on=False, **style)
        labels += [(p.label, p.x, p.y, color) for p in scatter.points if p.label and p.kind == kind]
    for value, text, place in scatter.references:
        axes.axhline(value, color=_hex(place), linewidth=1, linestyle=":")
        labels.append((text, scatter.x_range[0 if scatter.text_left else 1], value, _hex(place)))
    figure.legend_below(axes)
    figure.add_labels(axes, labels, [(point.x, point.y, scatter.marks[point.kind].size) for point in scatter.points])
    return drawn


def _x_axis(scatter: Scatter) -> alt.Axis:
    return alt.Axis(labelExpr=f"format(datum.value, '.4~g') + '{scatter.suffix}'", labelOverlap=True)


def _data(rows: Sequence[Mapping[str, object]]) -> alt.InlineData:
    return alt.InlineData(values=rows)


def _css(color: int | None) -> str:
    return chart.INK if color is None else chart.CSS_COLORS[color % len(chart.CSS_COLORS)]


def _hex(color: int | None) -> str:
    return figure.INK if color is None else figure.COLORS[color % len(figure.COLORS)]
