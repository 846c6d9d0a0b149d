"""PNGs by matplotlib: their colors, an axis without a frame, labels that keep apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from adjustText import adjust_text
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from qtrain.utils.atomic_write import atomic_write

BACKGROUND, INK, GRID = "#ffffff", "#1f2430", "#dde1e7"
COLORS = ("#0b62c4", "#c2410c", "#0f766e", "#9333ea", "#a16207", "#be185d")
"""The colors of series. ``page.css`` has the same ones, and their counterparts for a dark page."""


def new_figure(*, width: float = 8, height: float = 5) -> Figure:
    """An empty figure of ``width`` by ``height`` inches."""
    return Figure(figsize=(width, height), dpi=150, facecolor=BACKGROUND, layout="constrained")


def dress(axes: Axes, *, x: str = "", y: str = "", title: str = "") -> None:
    """Give ``axes`` a grid and names, and take its frame away."""
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.set_title(title, loc="left", color=INK, fontsize=10)
    axes.tick_params(colors=INK, which="both", length=0)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)


def legend_below(axes: Axes) -> None:
    """A legend under ``axes`` for all that has a label, if anything has."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3, frameon=False, labelcolor=INK, fontsize=9)


def add_labels(
    axes: Axes, labels: Sequence[tuple[str, float, float, str]], markers: Sequence[tuple[float, float, float]] = ()
) -> None:
    """Write each (text, x, y, color) close to its point; adjustText moves labels off each other and off ``markers``.

    ``markers`` are (x, y, diameter in points). Call it when the limits of ``axes`` are set.
    """
    if not labels:
        return
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()  # the constrained layout moves the axes, and distances are in pixels
    centers = axes.transData.transform([marker[:2] for marker in markers] or [label[1:3] for label in labels])
    sizes = [marker[2] * figure.dpi / 72 for marker in markers] or [0.0] * len(labels)
    boxes = [Bbox.from_bounds(x - s / 2, y - s / 2, s, s) for (x, y), s in zip(centers, sizes, strict=True)]
    texts = [axes.text(x, y, text, color=color, fontsize=9) for text, x, y, color in labels]
    arrow = {"arrowstyle": "-", "color": INK, "linewidth": 0.5, "alpha": 0.5}
    adjust_text(
        texts, objects=boxes, ax=axes, expand=(1.3, 1.8), force_text=(0.5, 0.8),
        force_explode=(0.3, 1.0), arrowprops=arrow, min_arrow_len=20, iter_lim=200,
    )  # fmt: skip


def write_png(figure: Figure, path: Path) -> None:
    """Write ``figure`` to ``path`` at 150 pixels an inch; the file appears only when it is whole."""
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png")
