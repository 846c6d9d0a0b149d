"""Where the texts of a scatter plot stand: labels of points, and those of its references."""

from dataclasses import dataclass
from typing import TypeAlias

from qtrain.report.placing import spread
from qtrain.report.scatter import PLOT, Scatter, css_color

Box: TypeAlias = tuple[float, float, float, float]
"""Left, bottom, right and top, in pixels of a plot."""

LETTER, LINE = 6.5, 15.0
"""Width of a letter of a reference, and the height of its line, in pixels."""


BESIDE = ((0, 1), (1, 0), (-1, 0), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))
PLACES = (*BESIDE, *((right, far * above) for far in (2, 3) for right, above in BESIDE if above))
"""Where a label may stand: so far to the right of its point and above it; the first that is free counts."""


@dataclass(frozen=True)
class ReferenceLabel:
    """The text of a reference at height ``y``, at the left or the right end of the plot; ``box`` is what it covers."""

    text: str
    y: float
    color: int | None
    left: bool
    box: Box


def reference_labels(scatter: Scatter) -> list[ReferenceLabel]:
    """A label above each reference, or as near to it as others leave room; all at the end where they hide less."""
    points = _points(scatter)
    tried: list[tuple[int, int, list[ReferenceLabel]]] = []
    for left in (scatter.text_left, not scatter.text_left):
        labels = _at_one_end(scatter, left)
        hidden = sum(_overlap(label.box, point) for label in labels for point in points)
        tried.append((hidden, len(tried), labels))
    return min(tried)[2]


def placed_labels(scatter: Scatter) -> list[dict[str, object]]:
    """A row for each label: above its point, or beside, below or farther off where that hides less."""
    taken = [*_points(scatter), *(label.box for label in reference_labels(scatter))]
    rows: list[dict[str, object]] = []
    for point in scatter.points:
        if point.label:
            mark, half = scatter.marks[point.kind], 3.3 * len(point.label)
            across, up = scatter.place(point.x, point.y)
            tried: list[tuple[int, int, float, float, Box]] = []
            for right, above in PLACES:
                x, y = across + right * (mark.radius + 4 + half), up + above * (mark.radius + 10)
                box = (x - half, y - 6, x + half, y + 6)
                outside = box[0] < 0 or box[1] < 0 or box[2] > PLOT[0] or box[3] > PLOT[1]
                tried.append((outside + sum(_overlap(box, other) for other in taken), len(tried), x, y, box))
            _, _, x, y, box = min(tried)
            taken.append(box)
            shown = dict(zip("xy", scatter.at(x, y), strict=True))
            rows.append({**shown, "label": point.label, "color": css_color(mark.color), "trial": point.trial})
    return rows


def _at_one_end(scatter: Scatter, left: bool) -> list[ReferenceLabel]:
    known = sorted(scatter.references, key=lambda reference: scatter.place(scatter.x_range[0], reference[0])[1])
    lines = [scatter.place(scatter.x_range[0], value)[1] for value, _, _ in known]
    middles = spread([up + LINE / 2 for up in lines], distance=LINE, low=LINE / 2, high=PLOT[1] - LINE / 2)
    labels = []
    for (_, text, color), up in zip(known, middles, strict=True):
        start = 0.0 if left else PLOT[0] - LETTER * len(text)
        box = (start, up - LINE / 2, start + LETTER * len(text), up + LINE / 2)
        labels.append(ReferenceLabel(text, scatter.at(0.0, up)[1], color, left, box))
    return labels


def _points(scatter: Scatter) -> list[Box]:
    found = []
    for point in scatter.points:
        (across, up), radius = scatter.place(point.x, point.y), scatter.marks[point.kind].radius
        found.append((across - radius, up - radius, across + radius, up + radius))
    return found


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
