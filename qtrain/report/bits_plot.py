"""Which layers of the front's models got how many bits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import altair as alt
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from qtrain.report import chart, figure
from qtrain.report.formatting import metric_text
from qtrain.spec import FULL_PRECISION
from qtrain.sweep.sweep_results import SweepResults
from qtrain.sweep.trial import Trial

FAINT, STRONG = 0.06, 0.55
"""Opacity of the fewest and of the most bits; a text over it stays legible."""

MOST_NUMBERS = 60
"""With more layers the cells of a PNG are too narrow for numbers."""


@dataclass(frozen=True)
class LayerCell:
    """The bits of one layer in one model of the front, of ``what``: its weights, its inputs, or both."""

    what: str
    model: str
    layer: str
    bits: int
    trial: int
    strength: float

    @property
    def text(self) -> str:
        return "float" if self.bits == FULL_PRECISION else str(self.bits)


def layer_cells(sweep: SweepResults) -> list[LayerCell]:
    """One row a model of the front, one column a layer; weights above inputs, or once where these are alike."""
    trials = [trial for trial in sweep.front if trial.layer_bits]
    alike = all(weight == input for trial in trials for weight, input in trial.layer_bits.values())
    sides = {"weights and inputs": 0} if alike else {"weights": 0, "inputs": 1}
    return [cell for what, side in sides.items() for cell in _cells(sweep, trials, what, side)]


def layer_bits(sweep: SweepResults) -> chart.Picture | None:
    """:func:`layer_cells` as colored cells; ``None`` where no layer's bits are known."""
    cells = layer_cells(sweep)
    return (_chart(cells), _figure(cells)) if cells else None


def _chart(cells: Sequence[LayerCell]) -> alt.TopLevelMixin:
    base = alt.Chart().encode(
        x=alt.X("layer:N", sort=None, title=None, axis=alt.Axis(labelAngle=-90, labelLimit=300)),
        y=alt.Y("model:N", sort=None, title=None),
        tooltip="trial:N",
    )
    squares = base.mark_rect(color=chart.CSS_COLORS[0]).encode(
        opacity=alt.Opacity("strength:Q", scale=None, legend=None),
        stroke=alt.condition(chart.CHOSEN, alt.value(chart.CSS_COLORS[1]), alt.value(chart.BACKGROUND)),
    )
    rows = alt.InlineData(values=[{**asdict(cell), "text": cell.text} for cell in cells])
    return (
        alt.layer(squares, base.mark_text(fontSize=10).encode(text="text:N"), data=rows)
        .properties(width=alt.Step(26), height=alt.Step(20))
        .facet(row=alt.Row("what:N", sort=None, title=None, header=alt.Header(labelOrient="top", labelAnchor="start")))
    )


def _figure(cells: Sequence[LayerCell]) -> Figure:
    panels, models, layers = (_distinct(getattr(cell, of) for cell in cells) for of in ("what", "model", "layer"))
    width, longest = min(16.0, max(6.0, 2.6 + 0.31 * len(layers))), max(map(len, layers))
    drawn = figure.new_figure(width=width, height=(0.24 * len(models) + 0.5) * len(panels) + 0.075 * longest)
    colors = LinearSegmentedColormap.from_list("bits", [figure.BACKGROUND, figure.COLORS[0]])
    for axes, what in zip(drawn.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0], panels, strict=True):
        strengths = np.full((len(models), len(layers)), np.nan)
        for cell in cells:
            if cell.what == what:
                y, x = models.index(cell.model), layers.index(cell.layer)
                strengths[y, x] = cell.strength
                if len(layers) <= MOST_NUMBERS:
                    size = 5 if cell.bits == FULL_PRECISION else 8
                    number = axes.text(x, y, cell.text, ha="center", va="center", color=figure.INK, fontsize=size)
                    number.set_in_layout(False)  # it lies inside, and to measure hundreds of them takes seconds
        figure.dress(axes, title=f"Bits of {what}")
        axes.imshow(strengths, cmap=colors, vmin=0, vmax=1, aspect="auto")
        axes.grid(visible=False)
        axes.set_yticks(range(len(models)), models, fontsize=8)
        axes.set_xticks(range(len(layers)), layers, rotation=90, fontsize=8)
    return drawn


def _cells(sweep: SweepResults, trials: list[Trial], what: str, side: int) -> Iterator[LayerCell]:
    known = sorted({pair[side] for trial in trials for pair in trial.layer_bits.values()})
    for trial in trials:
        metrics = "  ".join(metric_text(name, trial.metrics[name]) for name in list(sweep.objectives)[:2])
        model = f"{sweep.points[trial.id]}:  {metrics}"
        for layer, pair in trial.layer_bits.items():
            share = known.index(pair[side]) / (len(known) - 1) if len(known) > 1 else 0.5
            strength = FAINT + share * (STRONG - FAINT)
            yield LayerCell(what, model, layer, pair[side], sweep.numbers[trial.id], strength)


def _distinct(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))
