"""What scripts that draw rows of ``results/`` have in common: the command, and axes without ornament."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qtrain.pipeline.results import read_results
from qtrain.report.chart import light_colors
from qtrain.utils.atomic_write import atomic_write


def command(
    doc: str | None, draw: Callable[[list[dict[str, str]]], Figure], arguments: Sequence[str] | None = None
) -> int:
    """Write what ``draw`` makes of the rows of a file as a PNG file; ``doc`` is the script's own docstring."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("results", type=Path, help="CSV file of the rows")
    parser.add_argument("picture", type=Path, help="PNG file to write")
    options = parser.parse_args(arguments)
    with atomic_write(options.picture) as temporary:
        draw(read_results(options.results)).savefig(temporary, format="png")
    print(f"drew {options.picture}")
    return 0


def make_plain(axes: Axes) -> None:
    """A light grid behind the points, and neither frame nor ticks."""
    axes.tick_params(which="both", length=0)
    axes.grid(color=light_colors()["--line"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
