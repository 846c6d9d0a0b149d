"""Which layers of the front's models got how many bits."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from qtrain.report.canvas import MARK, Theme, new_figure
from qtrain.report.formatting import metric_text
from qtrain.report.pareto_plot import BLUE
from qtrain.spec import FULL_PRECISION
from qtrain.sweep.sweep_results import SweepResults
from qtrain.sweep.trial import Trial

FAINT, STRONG = 0.06, 0.55
"""Opacity of the fewest and of the most bits; a text over it stays legible."""

FIGURE_SPACE = "\u2007"
"""A blank as wide as a digit."""

MOST_NUMBERS = 60
"""With more layers cells are too narrow for numbers."""


def layer_bits(sweep: SweepResults, theme: Theme) -> Figure | None:
    """One row a model of the front, one column a layer; weights above inputs, or once where these are alike.

    ``None`` where no layer's bits are known.
    """
    rows = [trial for trial in sweep.front if trial.layer_bits]
    if not rows:
        return None
    layers = list(dict.fromkeys(layer for trial in rows for layer in trial.layer_bits))
    alike = all(weight == input for trial in rows for weight, input in trial.layer_bits.values())
    panels = {"Bits of weights and inputs": 0} if alike else {"Bits of weights": 0, "Bits of inputs": 1}
    width = min(16.0, 2.6 + 0.31 * len(layers))
    longest = max(map(len, layers))
    figure = new_figure(theme, width=max(6.0, width), height=(0.24 * len(rows) + 0.5) * len(panels) + 0.075 * longest)
    for axes, (title, side) in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels.items(), strict=True):
        _panel(axes, sweep, rows, layers, side, theme)
        axes.set_title(title, loc="left", color=theme.foreground, fontsize=10)
        last = side == len(panels) - 1
        axes.set_xticks([i + 0.5 for i in range(len(layers))], layers if last else [""] * len(layers), rotation=90)
        axes.tick_params(colors=theme.foreground, length=0, labelsize=8)
    return figure


def _panel(
    axes: Axes, sweep: SweepResults, rows: Sequence[Trial], layers: Sequence[str], side: int, theme: Theme
) -> None:
    axes.set_facecolor(theme.background)
    axes.set_xlim(0, len(layers))
    axes.set_ylim(len(rows), 0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    known = sorted({trial.layer_bits[layer][side] for trial in rows for layer in trial.layer_bits})
    for y, trial in enumerate(rows):
        for x, layer in enumerate(layers):
            if layer not in trial.layer_bits:
                continue
            bits = trial.layer_bits[layer][side]
            share = known.index(bits) / (len(known) - 1) if len(known) > 1 else 0.5
            cell = Rectangle(
                (x + 0.04, y + 0.06), 0.92, 0.88, facecolor=theme.series[BLUE],
                alpha=FAINT + share * (STRONG - FAINT), edgecolor="none",
            )  # fmt: skip
            axes.add_patch(cell)
            if len(layers) <= MOST_NUMBERS:
                text = "float" if bits == FULL_PRECISION else str(bits)
                size = 5 if bits == FULL_PRECISION else 8
                number = axes.text(
                    x + 0.5, y + 0.52, text, ha="center", va="center", color=theme.foreground, fontsize=size
                )
                number.set_in_layout(False)  # it lies inside, and to measure hundreds of them takes seconds
        # A frame around the row, for a script to find it by.
        axes.add_patch(
            Rectangle(
                (0, y), len(layers), 1, facecolor="none", edgecolor="none", gid=f"{MARK}{sweep.numbers[trial.id]}"
            )
        )
    axes.set_yticks([y + 0.5 for y in range(len(rows))], [_row_name(sweep, trial) for trial in rows])


def _row_name(sweep: SweepResults, trial: Trial) -> str:
    """Place on the front and metrics: ``3  90.12  68.5 kB``, digits below digits."""
    metrics = [metric_text(name, trial.metrics[name]) for name in list(sweep.objectives)[:2]]
    place = str(sweep.points[trial.id]).rjust(len(str(len(sweep.points))))
    widths = [max(len(metric_text(name, t.metrics[name])) for t in sweep.front) for name in list(sweep.objectives)[:2]]
    cells = [place, *(text.rjust(width) for text, width in zip(metrics, widths, strict=True))]
    return "  ".join(cells).replace(" ", FIGURE_SPACE)
