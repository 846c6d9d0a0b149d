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
from qtrain.report.canvas import LIGHT, place_labels

LOWEST = 8.0
"""Where the accuracy axis begins, in percent: just below chance among ten classes."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("results", type=Path, help="CSV file of the variants")
    parser.add_argument("picture", type=Path, help="PNG file to write")
    options = parser.parse_args(arguments)
    drawn = draw(gather_variants(read_results(options.results)))
    drawn.savefig(options.picture, facecolor=LIGHT.background)
    print(f"drew {options.picture}")
    return 0


def draw(variants: Sequence[Variant]) -> Figure:
    """One panel for each bit width of the inputs, widest first."""
    full = [variant for variant in variants if variant.bits == "32"]
    quantized = [variant for variant in variants if variant.bits != "32"]
    widths = sorted({int(variant.runs[0]["a_bits"]) for variant in quantized}, reverse=True)
    panels = [group for group in ([32], [b for b in widths if 4 < b < 32], [4], [2], [1]) if set(group) & set(widths)]
    figure = Figure(figsize=(13, 4.2 * len(panels)), dpi=110, facecolor=LIGHT.background, layout="constrained")
    for axes, group in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
        members = [variant for variant in quantized if int(variant.runs[0]["a_bits"]) in group]
        _panel(axes, members, full)
        what = (
            "in full precision"
            if group == [32]
            else f"of {' to '.join(map(str, sorted({min(group), max(group)})))} bits"
        )
        axes.set_title(f"Inputs {what}", loc="left", color=LIGHT.foreground, fontsize=11)
    return figure


def _panel(axes: Axes, members: Sequence[Variant], full: Sequence[Variant]) -> None:
    axes.set_facecolor(LIGHT.background)
    axes.grid(color=LIGHT.grid)
    axes.set_axisbelow(True)
    axes.set_xlabel("stored bits per weight, scales and codebooks included")
    axes.set_ylabel("top-1 %")
    labels = []
    points = [(v, v.mean("effective_bits"), v.mean("top1")) for v in members]
    tops = [top1 for _, _, top1 in points if top1 is not None]
    for variant, bits, top1 in points:
        if bits is None or top1 is None:
            continue
        axes.errorbar(bits, top1, yerr=variant.std, fmt="o", color=LIGHT.series[0], markersize=5, capsize=3)
        labels.append((variant.name.removesuffix(f"-{variant.bits.lower()}"), bits, top1, LIGHT.foreground))
    for variant in full:
        reached = float(variant.runs[0]["fp_top1"])
        axes.axhline(reached, color=LIGHT.series[1], linewidth=1)
        tops.append(reached)
    low, high = max(LOWEST, min(tops) - 3), max(tops) + 2
    axes.set_ylim(low, high)
    axes.margins(x=0.12)
    place_labels(axes, labels)


if __name__ == "__main__":
    sys.exit(main())
