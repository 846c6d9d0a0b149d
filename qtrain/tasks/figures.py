"""Floor 6: the picture of an experiment: accuracy against what a model costs.

Colour tells models apart, the marker how a model came by its accuracy: filled and joined by a solid line where a
teacher helped, open and dashed where none did, a cross where it was merely calibrated. Full precision is a line across.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter
from matplotlib.transforms import Bbox

from qtrain.tasks.summary import CALIBRATED, DISTILLED, FLOAT, TRAINED
from qtrain.tasks.table import Outcome


@dataclass(frozen=True)
class Theme:
    """Colours that are legible on ``background``; ``series`` are told apart also by readers with colour blindness."""

    background: str
    foreground: str
    grid: str
    series: tuple[str, ...]


LIGHT = Theme("#ffffff", "#1f2430", "#e3e6eb", ("#0b62c4", "#c2410c", "#0f766e", "#9333ea", "#a16207", "#be185d"))
DARK = Theme("#14171c", "#e6e8ec", "#2c323b", ("#6cb0ff", "#ff9a5c", "#4fd1c0", "#c79bff", "#e2c04b", "#ff8ab8"))

MARKERS = {CALIBRATED: "x", TRAINED: "o", DISTILLED: "o"}
LINES: dict[str, Literal["-", "--"]] = {TRAINED: "--", DISTILLED: "-"}
WORDS = {CALIBRATED: "calibrated only", TRAINED: "trained without teacher", DISTILLED: "trained with teacher"}
BELOW = " (lowest line: below the scale)"

DIRECTIONS = ((0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1))
DISTANCES = (8, 15, 25, 38, 55)
"""Where a label may go: so many points away from what it names, nearest first."""


@dataclass(frozen=True)
class CostAxis:
    """What is drawn from left to right; both of them on a logarithmic scale, cheaper models to the right."""

    label: str
    value: Callable[[Outcome], float]


COMPRESSION = CostAxis("compression: times smaller than full precision", lambda outcome: outcome.compression)
BIT_OPERATIONS = CostAxis("bit operations saved: times fewer than full precision", lambda outcome: outcome.bops_saved)


def accuracy_plot(outcomes: Iterable[Outcome], axis: CostAxis, theme: Theme = LIGHT) -> bytes:
    """A PNG of all rows of the closing table, 1200 x 750 pixels."""
    rows = list(outcomes)
    figure = Figure(figsize=(8, 5), dpi=150, facecolor=theme.background, layout="constrained")
    axes = figure.add_subplot(facecolor=theme.background)
    _dress(axes, axis, theme)
    placed = [row for row in rows if row.key.way != FLOAT and _drawable(axis.value(row))]
    floor = _set_limits(axes, rows, placed, axis)
    series: dict[str, list[Outcome]] = {}
    for row in placed:
        series.setdefault(_series(row, placed), []).append(row)
    colours = {name: theme.series[i % len(theme.series)] for i, name in enumerate(series)}

    labels = _reference_lines(axes, rows, series, colours, theme)
    for name, members in series.items():
        for way in (CALIBRATED, TRAINED, DISTILLED):
            points = sorted((axis.value(row), max(row.top1, floor)) for row in members if row.key.way == way)
            if points:
                _draw_way(axes, way, points, colours[name], theme)
        texts = _bit_labels(members, axis, floor, values=len(series) == 1)
        labels += [(text, x, y, colours[name]) for text, x, y in texts]
    _legend(axes, placed, colours, theme, cut=any(row.top1 < floor for row in placed))
    place_labels(axes, labels)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor=theme.background)
    return buffer.getvalue()


def place_labels(axes: Axes, labels: Sequence[tuple[str, float, float, str]]) -> list[Bbox]:
    """Write each (text, x, y, colour) close to its point, over no other label, marker or line if that can be.

    Greedy: the nearest free place of :data:`DIRECTIONS` and :data:`DISTANCES`, else the one with the least overlap. A
    thin line leads to a label that had to move away. Returns the labels' boxes in pixels.
    """
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()
    taken = _occupied(axes)
    bounds = axes.get_window_extent()
    boxes: list[Bbox] = []
    for text, x, y, colour in labels:
        note = axes.annotate(
            text, (x, y), xytext=(0, 0), textcoords="offset points", color=colour, fontsize=9, annotation_clip=False
        )
        best: tuple[float, tuple[float, float], tuple[str, str]] | None = None
        for distance in DISTANCES:
            for right, up in DIRECTIONS:
                align = ("center", "left", "right")[right], ("center", "bottom", "top")[up]
                box = _move(note, (right * distance, up * distance), align)
                cost = sum(_overlap(box, other) for other in taken) + 100 * _outside(box, bounds)
                if best is None or cost < best[0]:
                    best = cost, (right * distance, up * distance), align
            if best is not None and best[0] == 0:
                break
        assert best is not None
        box = _move(note, best[1], best[2])
        if max(map(abs, best[1])) > DISTANCES[1]:
            arrow = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkB": 4}
            axes.annotate("", (x, y), xytext=best[1], textcoords="offset points", arrowprops=arrow)
        taken.append(box)
        boxes.append(box)
    return boxes


def _move(note: Any, offset: tuple[float, float], align: tuple[str, str]) -> Bbox:
    note.set_position(offset)
    note.set(ha=align[0], va=align[1])
    return note.get_window_extent().padded(2)


def _occupied(axes: Axes) -> list[Bbox]:
    """Small boxes on every marker and along every line, and the legend's, in pixels."""
    boxes = []
    for line in axes.get_lines():
        pixels = line.get_transform().transform(line.get_xydata())
        if line.get_marker() not in ("None", None, ""):
            boxes += [Bbox.from_bounds(x - 9, y - 9, 18, 18) for x, y in pixels]
        if line.get_linestyle() != "None":
            for (x0, y0), (x1, y1) in pairwise(pixels):
                steps = max(2, int(math.hypot(x1 - x0, y1 - y0) / 8))
                along = [(x0 + (x1 - x0) * i / steps, y0 + (y1 - y0) * i / steps) for i in range(steps + 1)]
                boxes += [Bbox.from_bounds(x - 2, y - 2, 4, 4) for x, y in along]
    legend = axes.get_legend()
    if legend is not None:
        boxes.append(legend.get_window_extent())
    return boxes


def _overlap(a: Bbox, b: Bbox) -> float:
    """Common area in square pixels."""
    width, height = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
    return width * height if width > 0 and height > 0 else 0.0


def _outside(box: Bbox, bounds: Bbox) -> float:
    return box.width * box.height - _overlap(box, bounds)


def _draw_way(axes: Axes, way: str, points: list[tuple[float, float]], colour: str, theme: Theme) -> None:
    x, y = zip(*points, strict=True)
    axes.plot(
        x,
        y,
        color=colour,
        marker=MARKERS[way],
        markersize=6 if way == CALIBRATED else 8,
        markerfacecolor=colour if way == DISTILLED else theme.background,
        markeredgewidth=1.6,
        linestyle=LINES.get(way, "None"),
        linewidth=1.5,
        alpha=0.7 if way == CALIBRATED else 1,
        zorder=3,
        clip_on=False,
    )


def _reference_lines(
    axes: Axes, rows: list[Outcome], series: dict[str, list[Outcome]], colours: dict[str, str], theme: Theme
) -> list[tuple[str, float, float, str]]:
    """A line across for each model's full precision, in the model's colour where it has one; returns their labels."""
    references = [row for row in rows if row.key.way == FLOAT]
    labels = []
    for row in references:
        own = [name for name, members in series.items() if members[0].key[:2] == row.key[:2]]
        colour = colours[own[0]] if len(own) == 1 else theme.foreground
        axes.axhline(row.top1, color=colour, linewidth=1, linestyle=(0, (1, 2)))
        name = f"{_series(row, references)}: " if len(references) > 1 else ""
        labels.append((f"{name}full precision {row.top1:.2f} %", axes.get_xlim()[0], row.top1, colour))
    return labels


def _bit_labels(
    members: list[Outcome], axis: CostAxis, floor: float, *, values: bool
) -> list[tuple[str, float, float]]:
    """One label for each bit width, at its best point; with ``values`` also the accuracies below the plot's floor."""
    labels = []
    for bits in dict.fromkeys(row.key.bits for row in members):
        same = [row for row in members if row.key.bits == bits]
        best = max(same, key=lambda row: row.top1)
        labels.append((bits, axis.value(best), max(best.top1, floor)))
        if values:
            below = [row for row in same if row.top1 < floor]
            labels += [(f"{row.top1:.1f} %", axis.value(row), floor) for row in below]
    return labels


def _set_limits(axes: Axes, rows: list[Outcome], placed: list[Outcome], axis: CostAxis) -> float:
    """Limits that show all trained models well; the lowest accuracy that the plot can show.

    A calibrated-only model may lie tens of points below: it is then drawn on the lower edge.
    """
    xs = [axis.value(row) for row in placed] or [1.0]
    axes.set_xlim(min(xs) / 1.9, max(xs) * 1.35)
    ys = [row.top1 for row in rows if row.key.way != CALIBRATED] or [row.top1 for row in rows] or [0.0, 100.0]
    reach = max(max(ys) - min(ys), 2.0)
    lowest = min([min(ys) - 0.15 * reach, *(r.top1 for r in placed if r.top1 > min(ys) - 0.6 * reach)])
    bottom = lowest - 0.12 * reach
    axes.set_ylim(bottom, max(ys) + 0.18 * reach)
    return lowest if any(row.top1 < lowest for row in placed) else bottom


def _dress(axes: Axes, axis: CostAxis, theme: Theme) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axes.set_xlabel(axis.label, color=theme.foreground)
    axes.set_ylabel("top-1 accuracy, %", color=theme.foreground)
    axes.tick_params(colors=theme.foreground, which="both", length=0)
    axes.grid(color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _legend(axes: Axes, placed: list[Outcome], colours: dict[str, str], theme: Theme, *, cut: bool) -> None:
    """How a model was trained; and which colour is which model, where there are several.

    ``cut`` says that some calibrated-only models lie below the plot, and are drawn on its lower edge.
    """
    neutral = theme.foreground if len(colours) != 1 else next(iter(colours.values()))
    handles = []
    for way in (DISTILLED, TRAINED, CALIBRATED):
        if any(row.key.way == way for row in placed):
            handles.append(
                Line2D(
                    [],
                    [],
                    color=neutral,
                    marker=MARKERS[way],
                    markerfacecolor=neutral if way == DISTILLED else theme.background,
                    markeredgewidth=1.6,
                    linestyle=LINES.get(way, "None"),
                    label=WORDS[way] + (BELOW if cut and way == CALIBRATED else ""),
                )
            )
    if len(colours) > 1:
        handles += [Line2D([], [], color=colour, linewidth=4, label=name) for name, colour in colours.items()]
    if handles:
        axes.legend(
            handles=handles,
            loc="upper center",
            bbox_to_anchor=(0.5, -0.13),
            ncols=3,
            frameon=False,
            labelcolor=theme.foreground,
            fontsize=9,
        )


def _series(row: Outcome, among: list[Outcome]) -> str:
    """The model, with data set and quantizer where the rows ``among`` which it stands differ in them."""
    several = [len({getattr(other.key, part) for other in among}) > 1 for part in ("dataset", "quantizer")]
    parts = (row.key.dataset if several[0] else "", row.key.model, row.key.quantizer if several[1] else "")
    return " ".join(part for part in parts if part)


def _drawable(value: float) -> bool:
    return math.isfinite(value) and value > 0
