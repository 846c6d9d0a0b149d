"""Training curves as geometry for inline SVG, from a run's ``metrics.jsonl``.

A report holds many small charts; drawn as SVG they take the page's colors, light or dark, and weigh a few kilobytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

WIDTH, HEIGHT = 380, 210
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 12, 26
"""Size of a chart and the margins around its plot, in SVG units."""

MOST_POINTS = 240
"""A longer line is averaged down to so many points: more cannot be seen at this size."""

NO_LOSS = ("lr", "top1", "images_per_s")
"""Figures of a training row that are neither losses nor of one layer."""


@dataclass(frozen=True)
class Line:
    """One measured series: ``points`` are (optimizer step, value)."""

    label: str
    points: list[tuple[float, float]]


@dataclass(frozen=True)
class DrawnLine:
    """``path`` is an SVG path's ``d``; ``last`` the last value as text; ``dot`` marks a line of a single point."""

    label: str
    path: str
    last: str
    dot: tuple[float, float] | None


@dataclass(frozen=True)
class Chart:
    """A chart with everything placed: ticks are (position, text)."""

    title: str
    lines: list[DrawnLine]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    legend: bool = True


def charts(rows: Iterable[dict[str, Any]]) -> list[Chart]:
    """Losses, accuracies, how the scale of each layer's weight moved, and relative errors of quantization.

    Those of which there is something to see.
    """
    series: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in rows:
        for name, value in row.items():
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if number and name not in ("step", "epoch", "time", "split"):
                series.setdefault((str(row.get("split", "")), name), []).append((float(row["step"]), float(value)))
    losses, accuracies, scales, errors = [], [], [], []
    for (split, name), points in series.items():
        if name.startswith("scale/") and name.endswith(".weight") and points[0][1]:
            scales.append(Line(name[len("scale/") : -len(".weight")], [(x, y / points[0][1]) for x, y in points]))
        elif name.startswith("error/"):
            errors.append(Line(name[len("error/") :], points))
        elif name == "top1":
            accuracies.append(Line(f"{split} top-1", points))
        elif name == "agreement":
            accuracies.append(Line(f"{split} agreement with the teacher", points))
        elif "/" not in name and name not in NO_LOSS:
            losses.append(Line(f"{split} {name}", points))
    found = [draw("Loss", losses), draw("Accuracy, %", accuracies)]
    found.append(draw("Weight scales, relative to their first value (one line a layer)", scales, legend=False))
    found.append(draw("Relative error of weights and inputs (one line each)", errors, legend=False))
    return [chart for chart in found if chart is not None]


def draw(title: str, lines: list[Line], *, legend: bool = True) -> Chart | None:
    """The geometry of ``lines`` in one chart; ``None`` where no line has two points, which is nothing to look at."""
    lines = [Line(line.label, thin(line.points)) for line in lines if line.points]
    if all(len(line.points) < 2 for line in lines):
        return None
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    x_low, x_high = min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1
    pad = 0.06 * (max(ys) - min(ys)) or max(abs(max(ys)) * 0.05, 1e-6)
    y_low, y_high = min(ys) - pad, max(ys) + pad

    def place(x: float, y: float) -> tuple[float, float]:
        right = LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        down = TOP + (y_high - y) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)
        return round(right, 1), round(down, 1)

    drawn = []
    for line in lines:
        placed = [place(x, y) for x, y in line.points]
        path = "M" + "L".join(f"{x:g} {y:g}" for x, y in placed)
        drawn.append(DrawnLine(line.label, path, f"{line.points[-1][1]:.4g}", placed[0] if len(placed) == 1 else None))
    return Chart(
        title=title,
        lines=drawn,
        x_ticks=[(place(x, y_low)[0], f"{x:g}") for x in ticks(x_low, x_high)],
        y_ticks=[(place(x_low, y)[1], f"{y:g}") for y in ticks(y_low, y_high)],
        legend=legend,
    )


def thin(points: list[tuple[float, float]], most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """At most ``most`` points, each the mean of as many neighbors; the last is kept as it is.

    >>> thin([(0.0, 1.0), (1.0, 3.0), (2.0, 5.0), (3.0, 7.0), (4.0, 0.0)], most=3)
    [(0.5, 2.0), (2.5, 6.0), (4.0, 0.0)]
    """
    if len(points) <= most:
        return points
    size = math.ceil((len(points) - 1) / (most - 1))
    groups = [points[i : min(i + size, len(points) - 1)] for i in range(0, len(points) - 1, size)]
    means = [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]
    return [*means, points[-1]]


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """At most ``most`` + 1 round numbers within [low, high], 1, 2 or 5 times a power of ten apart.

    >>> ticks(0.0, 100.0), ticks(0.93, 1.08)
    ([0.0, 20.0, 40.0, 60.0, 80.0, 100.0], [0.95, 1.0, 1.05])
    """
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]
