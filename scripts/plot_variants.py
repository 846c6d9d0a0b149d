"""Draws accuracy against bits per weight for the variants of an experiment, from its rows in ``results/``.

    python scripts/plot_variants.py results/shootout.csv docs/shootout.png

Every point is a trained variant, the mean over its seeds. Panels share the bits of the inputs, since these cost more
than those of the weights; the full-precision network is the line across.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from adjustText import adjust_text
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from pictures import command, make_plain
from result_tables.variant import Variant, gather_variants

from qtrain.report.chart import light_colors

LOWEST = 8.0
"""Where the accuracy axis begins, in percent: just below chance among ten classes."""


def main(arguments: Sequence[str] | None = None) -> int:
    return command(__doc__, lambda rows: draw(gather_variants(rows)), arguments)


def draw(variants: Sequence[Variant]) -> Figure:
    """One panel for each bit width of the inputs, widest first."""
    full = [variant for variant in variants if variant.bits == "32"]
    quantized = [variant for variant in variants if variant.bits != "32"]
    widths = sorted({int(variant.runs[0]["a_bits"]) for variant in quantized}, reverse=True)
    panels = [group for group in ([32], [b for b in widths if 4 < b < 32], [4], [2], [1]) if set(group) & set(widths)]
    figure = Figure(figsize=(13, 4.2 * len(panels)), dpi=150, layout="constrained")
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
    axes.set_xlabel("stored bits per weight, scales and codebooks included")
    axes.set_ylabel("top-1 %")
    axes.set_title(title, loc="left", fontsize=10)
    make_plain(axes)
    labels = []
    points = [(v, v.mean("effective_bits"), v.mean("top1")) for v in members]
    tops = [top1 for _, _, top1 in points if top1 is not None]
    for variant, bits, top1 in points:
        if bits is None or top1 is None:
            continue
        axes.errorbar(bits, top1, yerr=variant.std, fmt="o", color=light_colors()["--c0"], markersize=5, capsize=3)
        labels.append((variant.name.removesuffix(f"-{variant.bits.lower()}"), bits, top1))
    for variant in full:
        reached = float(variant.runs[0]["fp_top1"])
        axes.axhline(reached, color=light_colors()["--c1"], linewidth=1)
        tops.append(reached)
    low, high = max(LOWEST, min(tops) - 3), max(tops) + 2
    axes.set_ylim(low, high)
    axes.margins(x=0.12)
    _add_labels(axes, labels)


def _add_labels(axes: Axes, labels: Sequence[tuple[str, float, float]]) -> None:
    """Write each (text, x, y) close to its point; adjustText moves labels off each other and off the points."""
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()  # the constrained layout moves the axes, and distances are in pixels
    half = 2.5 * figure.dpi / 72
    centers = axes.transData.transform([label[1:] for label in labels])
    boxes = [Bbox.from_extents(x - half, y - half, x + half, y + half) for x, y in centers]
    arrow = {"arrowstyle": "-", "linewidth": 0.5, "alpha": 0.5}
    adjust_text(
        [axes.text(x, y, text, fontsize=9) for text, x, y in labels], objects=boxes, ax=axes, expand=(1.3, 1.8),
        force_text=(0.5, 0.8), force_explode=(0.3, 1.0), arrowprops=arrow, min_arrow_len=20, iter_lim=200,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
