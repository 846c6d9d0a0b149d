"""Accuracy against a cost, as data and as a chart."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias, TypedDict

import altair as alt

from qtrain.report import chart

LOGARITHMIC = 3.0
"""A cost axis is logarithmic where its largest value is so many times its smallest."""

POINTS = 0.01
"""The resolution of an accuracy in percent: tables show two digits."""

REACH = 0.4
"""The plot extends below its lowest important point by this part of the height of all important points."""

RING = "M-1,0A1,1,0,1,1,1,0A1,1,0,1,1,-1,0ZM-.7,0A.7,.7,0,1,0,.7,0A.7,.7,0,1,0,-.7,0Z"
FRAME = "M0,-1L1,0L0,1L-1,0ZM0,-.75L-.75,0L0,.75L.75,0Z"
"""Symbols of Vega for an open circle and an open diamond."""

SHAPES = {"dot": "circle", "ring": RING, "frame": FRAME, "cross": "cross", "down": "triangle-down", "up": "triangle-up"}
"""Shape -> the symbol of Vega."""

PLOT = (740.0, 420.0)
"""Width and height of the plot of a PNG, in which labels are placed."""

Box: TypeAlias = tuple[float, float, float, float]
"""Left, bottom, right and top, in pixels of a plot."""


@dataclass(frozen=True)
class Mark:
    """How points of one kind look. ``color`` is a place in the series' colors, ``None`` the text's color.

    ``size`` is a diameter in points. Points of a kind with a ``line`` that are ``joined`` are so from left to right.
    """

    shape: str
    size: float = 8.0
    color: int | None = None
    opacity: float = 1.0
    line: str | None = None

    @property
    def radius(self) -> float:
        """In pixels of a chart."""
        return 0.7 * self.size


@dataclass(frozen=True)
class ScatterPoint:
    """``kind`` names the point's mark, ``tip`` is what the page says of it, ``trial`` its number in a sweep."""

    x: float
    y: float
    kind: str
    label: str = ""
    tip: str = ""
    trial: int = -1
    joined: bool = True


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
        margin = 0.06 * (max(xs) - min(xs) or abs(max(xs)) or 1.0)
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

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Pixels from the left and from the bottom of :data:`PLOT`."""
        (left, right), (low, high) = self.x_range, sorted(self.y_range)
        share = math.log(x / left) / math.log(right / left) if self.logarithmic else (x - left) / (right - left)
        return share * PLOT[0], (y - low) / (high - low) * PLOT[1]

    def at(self, across: float, up: float) -> tuple[float, float]:
        """The inverse of :meth:`place`."""
        (left, right), (low, high) = self.x_range, sorted(self.y_range)
        share = across / PLOT[0]
        x = left * (right / left) ** share if self.logarithmic else left + share * (right - left)
        return x, low + up / PLOT[1] * (high - low)

    def joined(self, kind: str) -> list[tuple[float, float]]:
        return sorted((point.x, point.y) for point in self.points if point.kind == kind and point.joined)


def reach_of(values: Sequence[float], resolution: float) -> float:
    """How high a plot of ``values`` is: their range, or more where that is little; at least ``resolution``, above 0."""
    return max(max(values) - min(values), 0.02 * abs(max(values)), resolution) or 1.0


def y_limits(
    important: Iterable[float], others: Iterable[float], *, resolution: float = 0.0
) -> tuple[float, float, float]:
    """(low, high, floor): the limits of the plot, and the lowest value that is drawn where it is.

    A model that collapsed to chance would press all others together; it is drawn at ``floor``. Smaller differences
    than ``resolution`` mean nothing.
    """
    ours = list(important)
    reach = reach_of(ours, resolution)
    floor = max(min([*ours, *others]), min(ours) - REACH * reach)
    return floor - 0.08 * reach, max(ours) + 0.16 * reach, floor


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
        {**asdict(point), "size": (2 * mark.radius) ** 2, "opacity": mark.opacity, "color": _css(mark.color)}
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
            shape=alt.Shape(**by_kind([SHAPES[mark.shape] for mark in marks])),
            fill=alt.Fill(**by_kind([_css(mark.color) for mark in marks])),
            size=alt.Size("size:Q", scale=None),
            opacity=alt.Opacity("opacity:Q", scale=None),
            stroke=alt.Stroke(**edge),
            tooltip="tip:N",
        )
    )
    labels = alt.Chart(_data(placed_labels(scatter))).encode(x, y).mark_text(fontSize=11)
    layers.append(labels.encode(text="label:N", color=alt.Color("color:N", scale=None)))
    return alt.layer(*layers).properties(width="container", height=330)


def placed_labels(scatter: Scatter) -> list[dict[str, object]]:
    """A row for each label: above its point, or beside or below it where that hides fewer points and texts."""
    taken: list[Box] = []
    for point in scatter.points:
        (across, up), radius = scatter.place(point.x, point.y), scatter.marks[point.kind].radius
        taken.append((across - radius, up - radius, across + radius, up + radius))
    for value, text, _ in scatter.references:
        left, up = 0.0 if scatter.text_left else PLOT[0] - 6.5 * len(text), scatter.place(scatter.x_range[0], value)[1]
        taken.append((left, up, left + 6.5 * len(text), up + 14))
    rows: list[dict[str, object]] = []
    for point in scatter.points:
        if point.label:
            mark, half = scatter.marks[point.kind], 3.3 * len(point.label)
            across, up = scatter.place(point.x, point.y)
            tried: list[tuple[int, int, float, float, Box]] = []
            for right, above in ((0, 1), (1, 0), (-1, 0), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)):
                x, y = across + right * (mark.radius + 4 + half), up + above * (mark.radius + 10)
                box = (x - half, y - 6, x + half, y + 6)
                outside = box[0] < 0 or box[1] < 0 or box[2] > PLOT[0] or box[3] > PLOT[1]
                tried.append((outside + sum(_overlap(box, other) for other in taken), len(tried), x, y, box))
            _, _, x, y, box = min(tried)
            taken.append(box)
            shown = dict(zip("xy", scatter.at(x, y), strict=True))
            rows.append({**shown, "label": point.label, "color": _css(mark.color), "trial": point.trial})
    return rows


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _x_axis(scatter: Scatter) -> alt.Axis:
    return alt.Axis(labelExpr=f"format(datum.value, '.4~g') + '{scatter.suffix}'", labelOverlap=True)


def _data(rows: Sequence[Mapping[str, object]]) -> alt.InlineData:
    return alt.InlineData(values=rows)


def _css(color: int | None) -> str:
    return chart.INK if color is None else chart.CSS_COLORS[color % len(chart.CSS_COLORS)]
