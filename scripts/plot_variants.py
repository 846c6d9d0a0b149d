"""Draws accuracy against bits per weight for the variants of an experiment, from its rows in ``results/``.

    python scripts/plot_variants.py results/shootout.csv docs/shootout.png

Every point is a trained variant, the mean over its seeds. Panels share the bits of the inputs, since these cost more
than those of the weights; the full-precision network is the line across.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from render_results import Variant, gather_variants

from qtrain.pipeline.results import read_results
from qtrain.report.figure import COLORS, INK, add_labels, dress, new_figure, write_png

LOWEST = 8.0
"""Where the accuracy axis begins, in percent: just below chance among ten classes."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("results", type=Path, help="CSV file of the variants")
    parser.add_argument("picture", type=Path, help="PNG file to write")
    options = parser.parse_args(arguments)
    write_png(draw(gather_variants(read_results(options.results))), options.picture)
    print(f"drew {options.picture}")
    return 0


def draw(variants: Sequence[Variant]) -> Figure:
    """One panel for each bit width of the inputs, widest first."""
    full = [variant for variant in variants if variant.bits == "32"]
    quantized = [variant for variant in variants if variant.bits != "32"]
    widths = sorted({int(variant.runs[0]["a_bits"]) for variant in quantized}, reverse=True)
    panels = [group for group in ([32], [b for b in widths if 4 < b < 32], [4], [2], [1]) if set(group) & set(widths)]
    figure = new_figure(width=13, height=4.2 * len(panels))
    for axes, group in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
        members = [variant for variant in quantized if int(variant.runs[0]["a_bits"]) in group]
        what = (
            "in full precision"
            if group == [32]
            else f"of {' to '.join(map(str, sorted({min(group), max(group)})))} bits"
        )
        _panel(axes, members, full, title=f"Inputs {what}")
    return figure


def _panel(axes: Axes, members: Sequence[Variant], full: Sequence[Variant], *, title: str) -> None:
    dress(axes, x="stored bits per weight, scales and codebooks included", y="top-1 %", title=title)
    labels, markers = [], []
    points = [(v, v.mean("effective_bits"), v.mean("top1")) for v in members]
    tops = [top1 for _, _, top1 in points if top1 is not None]
    for variant, bits, top1 in points:
        if bits is None or top1 is None:
            continue
        axes.errorbar(bits, top1, yerr=variant.std, fmt="o", color=COLORS[0], markersize=5, capsize=3)
        markers.append((bits, top1, 5.0))
        labels.append((variant.name.removesuffix(f"-{variant.bits.lower()}"), bits, top1, INK))
    for variant in full:
        reached = float(variant.runs[0]["fp_top1"])
        axes.axhline(reached, color=COLORS[1], linewidth=1)
        tops.append(reached)
    low, high = max(LOWEST, min(tops) - 3), max(tops) + 2
    axes.set_ylim(low, high)
    axes.margins(x=0.12)
    add_labels(axes, labels, markers)


if __name__ == "__main__":
    sys.exit(main())
