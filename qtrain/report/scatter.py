"""Accuracy against a cost, as data; :mod:`qtrain.report.scatter_chart` draws it."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from qtrain.report import chart

LOGARITHMIC = 3.0
"""A cost axis is logarithmic where its largest value is so many times its smallest."""

POINTS = 0.01
"""The resolution of an accuracy in percent: tables show two digits."""

REACH = 0.4
"""The plot extends below its lowest important point by this part of the height of all important points."""

PLOT = (740.0, 420.0)
"""Width and height of the plot of a PNG, in which labels are placed."""


@dataclass(frozen=True)
class Mark:
    """How points of one kind look. ``color`` is a place in the series' colors, ``None`` the text's color.

    ``shape`` is one of :data:`qtrain.report.scatter_chart.SHAPES`, ``size`` a diameter in points. Points of a kind with
    a ``line`` that are ``joined`` are so from left to right.
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
        """Whether references rather have their text at the left end, since the best point is in the right half."""
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


def css_color(color: int | None) -> str:
    """The color of a series; they begin again after the last."""
    return chart.INK if color is None else chart.CSS_COLORS[color % len(chart.CSS_COLORS)]
