"""Which layers of the front's models got how many bits."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import altair as alt

from qtrain.report import chart
from qtrain.report.formatting import metric_text
from qtrain.spec import FULL_PRECISION
from qtrain.sweep.sweep_results import SweepResults
from qtrain.sweep.trial import Trial

FAINT, STRONG = 0.06, 0.55
"""Opacity of the fewest and of the most bits; a text over it stays legible."""


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


def layer_bits(sweep: SweepResults) -> alt.TopLevelMixin | None:
    """:func:`layer_cells` as colored cells; ``None`` where no layer's bits are known."""
    cells = layer_cells(sweep)
    if not cells:
        return None
    # Said outright, since in panels Vega-Lite's own order is neither that of the rows nor that of the names.
    layers, models, sides = (list(dict.fromkeys(getattr(c, of) for c in cells)) for of in ("layer", "model", "what"))
    base = alt.Chart().encode(
        x=alt.X("layer:N", sort=layers, title=None, axis=alt.Axis(labelAngle=-90, labelLimit=300)),
        y=alt.Y("model:N", sort=models, title=None),
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
        .facet(row=alt.Row("what:N", sort=sides, title=None, header=alt.Header(labelOrient="top", labelAnchor="start")))
    )


def _cells(sweep: SweepResults, trials: list[Trial], what: str, side: int) -> Iterator[LayerCell]:
    known = sorted({pair[side] for trial in trials for pair in trial.layer_bits.values()})
    for trial in trials:
        metrics = "  ".join(metric_text(name, trial.metrics[name]) for name in list(sweep.objectives)[:2])
        model = f"{sweep.points[trial.id]}:  {metrics}"
        for layer, pair in trial.layer_bits.items():
            share = known.index(pair[side]) / (len(known) - 1) if len(known) > 1 else 0.5
            strength = FAINT + share * (STRONG - FAINT)
            yield LayerCell(what, model, layer, pair[side], sweep.numbers[trial.id], strength)
