"""What all pictures have in common: colors, a bare axis, labels that find a free place, files.

A picture is drawn once and kept twice: as a PNG, and as SVG whose colors are the page's own, light or dark.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox


@dataclass(frozen=True)
class Theme:
    """Colors that are legible on ``background``; ``series`` are told apart also by readers with color blindness."""

    background: str
    foreground: str
    grid: str
    series: tuple[str, ...]


LIGHT = Theme("#ffffff", "#1f2430", "#e3e6eb", ("#0b62c4", "#c2410c", "#0f766e", "#9333ea", "#a16207", "#be185d"))
DARK = Theme("#14171c", "#e6e8ec", "#2c323b", ("#6cb0ff", "#ff9a5c", "#4fd1c0", "#c79bff", "#e2c04b", "#ff8ab8"))

MARK = "mark-"
"""What the ``gid`` of an artist begins with that an SVG keeps: ``mark-7`` becomes ``data-mark="7"``, for a script."""

DIRECTIONS = ((0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1))
DISTANCES = (8, 15, 25, 38, 55)
"""Where a label may go: so many points away from what it names, nearest first."""


def new_figure(theme: Theme, *, width: float = 8, height: float = 5) -> Figure:
    """An empty figure of ``width`` by ``height`` inches, on the ground of ``theme``."""
    figure = Figure(figsize=(width, height), dpi=150, facecolor=theme.background, layout="constrained")
    FigureCanvasAgg(figure)  # the plain canvas has no renderer, and measures each text by drawing the whole picture
    return figure


def dress(axes: Axes, theme: Theme, *, x: str = "", y: str = "") -> None:
    """A bare axis: a grid and no frame, named ``x`` and ``y``."""
    axes.set_facecolor(theme.background)
    axes.set_xlabel(x, color=theme.foreground)
    axes.set_ylabel(y, color=theme.foreground)
    axes.tick_params(colors=theme.foreground, which="both", length=0)
    axes.grid(color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)


def png(figure: Figure) -> bytes:
    """``figure`` at 150 pixels an inch."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor=figure.get_facecolor())
    return buffer.getvalue()


def svg(figure: Figure, name: str, theme: Theme) -> str:
    """``figure``, drawn with ``theme``, as an SVG element to stand in a page that defines ``--back`` and so on.

    Text stays text. Ids are made of ``name``, which no other picture of the page may have. The theme's colors become
    the page's custom properties: ``--back``, ``--front``, ``--line``, and ``--c0`` to ``--c5`` for series.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", facecolor="none", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg class="plot" id="plot-{name}" role="img" \1>', text)
    text = re.sub(rf'id="{MARK}([^"]*)"', r'data-mark="\1"', text)
    used = set(re.findall(r"#([\w.-]+)[\")]", text))
    text = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used or m[1] == f"plot-{name}" else "", text)
    text = re.sub(r" font-family: [^;\"]*;", "", text)  # the page's own
    text = re.sub(r"\s*\n\s*", " ", text)
    colors = {theme.background: "back", theme.foreground: "front", theme.grid: "line"}
    colors |= {color: f"c{number}" for number, color in enumerate(theme.series)}
    for color, variable in colors.items():
        text = re.sub(rf"{color}\b", f"var(--{variable})", text)
    return text


def place_labels(axes: Axes, labels: Sequence[tuple[str, float, float, str]]) -> list[Bbox]:
    """Write each (text, x, y, color) close to its point, over no other label, marker or line if that can be.

    Greedy: the nearest free place of :data:`DIRECTIONS` and :data:`DISTANCES`, else the one with the least overlap. A
    thin line leads to a label that had to move away. Returns the labels' boxes in pixels.
    """
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()
    taken = _occupied(axes)
    bounds = axes.get_window_extent()
    boxes: list[Bbox] = []
    for text, x, y, color in labels:
        note = axes.annotate(
            text, (x, y), xytext=(0, 0), textcoords="offset points", color=color, fontsize=9, annotation_clip=False
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
            arrow = {"arrowstyle": "-", "color": color, "linewidth": 0.6, "shrinkB": 4}
            axes.annotate("", (x, y), xytext=best[1], textcoords="offset points", arrowprops=arrow)
        taken.append(box)
        boxes.append(box)
    return boxes


def _move(note: Any, offset: tuple[float, float], align: tuple[str, str]) -> Bbox:
    note.set_position(offset)
    note.set(ha=align[0], va=align[1])
    return note.get_window_extent().padded(2)


def _occupied(axes: Axes) -> list[Bbox]:
    """Small boxes on every marker and along every line, those of texts and of the legend, in pixels."""
    boxes = []
    figure = axes.get_figure()
    assert figure is not None
    for line in axes.get_lines():
        pixels = line.get_transform().transform(line.get_xydata())
        if line.get_marker() not in ("None", None, ""):
            half = 1 + 1.25 * line.get_markersize() * figure.dpi / 144  # a diamond is wider than it says
            boxes += [Bbox.from_bounds(x - half, y - half, 2 * half, 2 * half) for x, y in pixels]
        if line.get_linestyle() != "None":
            for (x0, y0), (x1, y1) in pairwise(pixels):
                steps = max(2, int(math.hypot(x1 - x0, y1 - y0) / 8))
                along = [(x0 + (x1 - x0) * i / steps, y0 + (y1 - y0) * i / steps) for i in range(steps + 1)]
                boxes += [Bbox.from_bounds(x - 2, y - 2, 4, 4) for x, y in along]
    boxes += [text.get_window_extent() for text in axes.texts]
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
