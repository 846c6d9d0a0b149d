"""The picture of an experiment: accuracy against what a model costs.

Color tells models apart, the marker how a model came by its accuracy: filled and joined by a solid line where a
teacher helped, open and dashed where none did, a cross where it was merely calibrated. Full precision is a line across.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from qtrain.pipeline.summary import CALIBRATED, DISTILLED, FLOAT, TRAINED
from qtrain.report.canvas import LIGHT, Theme, dress, new_figure, place_labels, png
from qtrain.report.table import Outcome

MARKERS = {CALIBRATED: "x", TRAINED: "o", DISTILLED: "o"}
LINES: dict[str, Literal["-", "--"]] = {TRAINED: "--", DISTILLED: "-"}
WORDS = {CALIBRATED: "calibrated only", TRAINED: "trained without teacher", DISTILLED: "trained with teacher"}
BELOW = " (lowest line: below the scale)"


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
    figure = new_figure(theme)
    axes = figure.add_subplot()
    dress(axes, theme, x=axis.label, y="top-1 accuracy, %")
    _scale(axes)
    placed = [row for row in rows if row.key.way != FLOAT and _drawable(axis.value(row))]
    floor = _set_limits(axes, rows, placed, axis)
    series: dict[str, list[Outcome]] = {}
    for row in placed:
        series.setdefault(_series(row, placed), []).append(row)
    colors = {name: theme.series[i % len(theme.series)] for i, name in enumerate(series)}

    labels = _reference_lines(axes, rows, series, colors, theme)
    for name, members in series.items():
        for way in (CALIBRATED, TRAINED, DISTILLED):
            points = sorted((axis.value(row), max(row.top1, floor)) for row in members if row.key.way == way)
            if points:
                _draw_way(axes, way, points, colors[name], theme)
        texts = _bit_labels(members, axis, floor, values=len(series) == 1)
        labels += [(text, x, y, colors[name]) for text, x, y in texts]
    _legend(axes, placed, colors, theme, cut=any(row.top1 < floor for row in placed))
    place_labels(axes, labels)
    return png(figure)


def _draw_way(axes: Axes, way: str, points: list[tuple[float, float]], color: str, theme: Theme) -> None:
    x, y = zip(*points, strict=True)
    axes.plot(
        x,
        y,
        color=color,
        marker=MARKERS[way],
        markersize=6 if way == CALIBRATED else 8,
        markerfacecolor=color if way == DISTILLED else theme.background,
        markeredgewidth=1.6,
        linestyle=LINES.get(way, "None"),
        linewidth=1.5,
        alpha=0.7 if way == CALIBRATED else 1,
        zorder=3,
        clip_on=False,
    )


def _reference_lines(
    axes: Axes, rows: list[Outcome], series: dict[str, list[Outcome]], colors: dict[str, str], theme: Theme
) -> list[tuple[str, float, float, str]]:
    """A line across for each model's full precision, in the model's color where it has one; returns their labels."""
    references = [row for row in rows if row.key.way == FLOAT]
    labels = []
    for row in references:
        own = [name for name, members in series.items() if members[0].key[:2] == row.key[:2]]
        color = colors[own[0]] if len(own) == 1 else theme.foreground
        axes.axhline(row.top1, color=color, linewidth=1, linestyle=(0, (1, 2)))
        name = f"{_series(row, references)}: " if len(references) > 1 else ""
        labels.append((f"{name}full precision {row.top1:.2f} %", axes.get_xlim()[0], row.top1, color))
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


def _scale(axes: Axes) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))


def _legend(axes: Axes, placed: list[Outcome], colors: dict[str, str], theme: Theme, *, cut: bool) -> None:
    """How a model was trained; and which color is which model, where there are several.

    ``cut`` says that some calibrated-only models lie below the plot, and are drawn on its lower edge.
    """
    neutral = theme.foreground if len(colors) != 1 else next(iter(colors.values()))
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
    if len(colors) > 1:
        handles += [Line2D([], [], color=color, linewidth=4, label=name) for name, color in colors.items()]
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
