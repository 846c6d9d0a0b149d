"""Draws how a step's time grows along each axis of ``bench_scaling.py``, from its rows in ``results/``.

    python scripts/plot_scaling.py results/scaling.csv docs/scaling.png

A panel has the milliseconds of a step in full precision and of the student, of several measurements of one point the
last. Axes begin at zero, so that what is linear is a straight line.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pictures import command, make_plain

from qtrain.report.chart import light_colors

COLORS = {"full precision": "--c1", "student": "--c0"}

Row = dict[str, str]


def main(arguments: Sequence[str] | None = None) -> int:
    return command(__doc__, draw, arguments)


def draw(rows: Sequence[Row]) -> Figure:
    """A panel for each axis, in the order in which they were measured."""
    latest = {(row["axis"], row["at"], row["case"]): row for row in rows}
    axes = list(dict.fromkeys(row["axis"] for row in rows))
    figure = Figure(figsize=(3.3 * len(axes), 3.2), dpi=150, layout="constrained")
    for panel, axis in zip(figure.subplots(1, len(axes), squeeze=False)[0], axes, strict=True):
        _panel(panel, axis, [row for row in latest.values() if row["axis"] == axis])
    return figure


def _panel(panel: Axes, axis: str, rows: Sequence[Row]) -> None:
    colors = light_colors()
    for case, color in COLORS.items():
        points = sorted((float(row["at"]), float(row["step_ms"])) for row in rows if row["case"] == case)
        panel.plot(*zip(*points, strict=True), color=colors[color], marker="o", markersize=4, linewidth=1.5, label=case)
    panel.set_xlim(left=0)
    panel.set_ylim(bottom=0)
    panel.set_xlabel(axis)
    panel.set_ylabel("ms a step")
    panel.legend(frameon=False, fontsize=8)
    make_plain(panel)


if __name__ == "__main__":
    sys.exit(main())
