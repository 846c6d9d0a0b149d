"""All pictures of a sweep in the order in which its page shows them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import altair as alt

from qtrain.report import chart
from qtrain.report.bits_plot import layer_bits
from qtrain.report.formatting import knob_label, metric_label
from qtrain.report.pareto_plot import pareto_scatter, planes
from qtrain.report.scatter_chart import draw_scatter
from qtrain.report.trial_lines import learning_curves, parallel
from qtrain.sweep.sweep_results import SweepResults

MOST_BARS = 24
"""Knobs that the picture of importance shows; bits of many layers are many knobs."""


REST = "not explained"
"""The bar of what no knob explains."""


@dataclass(frozen=True)
class Plot:
    """A picture: ``name`` is its file's without ``.png``; ``note`` says on the page how to read it.

    ``draw`` gives ``None`` where there is nothing to see. A ``half`` one shares its line with another where the page is
    wide. Those that decide come first, the front's table after them.
    """

    name: str
    title: str
    note: str
    draw: Callable[[SweepResults], alt.TopLevelMixin | None]
    half: bool = False
    decides: bool = False


def plots(sweep: SweepResults) -> Iterator[Plot]:
    """The pictures that may be drawn of ``sweep``."""
    first = metric_label(sweep.first).removesuffix(" %")
    for cost in planes(sweep):
        label = metric_label(cost)
        yield Plot(
            f"{_file(sweep.first)}_vs_{_file(cost)}",
            f"{first[0].upper()}{first[1:]} against {label}",
            f"The line is the best {first} at each {label}. Numbers are places on the front.",
            partial(pareto, cost=cost),
            half=True,
            decides=True,
        )
    yield Plot(
        "layer_bits",
        "Bits of each layer",
        "The models of the front, the best first. The stronger the color, the more bits.",
        layer_bits,
    )
    yield Plot(
        "parallel_coordinates",
        "What was chosen, and what it led to",
        "Each trial is a line, those of the front are blue; objectives have their better end up. A line passes below a "
        "knob that did not count. An objective far off stands at the lower end of its axis.",
        parallel,
    )
    yield Plot(
        "importance",
        "Importance of each knob",
        "How much of the differences between finished trials each knob explains: together as much as a random forest "
        "foretells of trials that it has not seen, in proportion to what each does alone. The rest is chance, or takes "
        "more trials to tell.",
        importance,
        half=True,
    )
    yield Plot(
        "learning_curves",
        "Learning curves",
        "The front's are blue, with their places; a gray line that ends early was stopped.",
        learning_curves,
        half=True,
    )


def shares(sweep: SweepResults) -> dict[str, dict[str, float]]:
    """Objective -> knob -> percent of the differences that it explains; knobs in the order of the first objective.

    At the end what none explains, as :data:`REST`.
    """
    found = {name: by_knob for name in sweep.objectives if (by_knob := sweep.importance(name))}
    if not found:
        return {}
    first = next(iter(found.values()))
    knobs = sorted(first, key=lambda knob: -first[knob])[:MOST_BARS]
    return {
        metric_label(name): {_bar_name(sweep, knob): 100 * by_knob.get(knob, 0.0) for knob in knobs}
        | {REST: 100 * (1 - sum(by_knob.values()))}
        for name, by_knob in found.items()
    }


def importance(sweep: SweepResults) -> alt.TopLevelMixin | None:
    """Bars, one panel for each objective."""
    found = shares(sweep)
    if not found:
        return None
    rows = [
        {"objective": name, "knob": knob, "share": round(share)}
        for name, by_knob in found.items()
        for knob, share in by_knob.items()
    ]
    bars = alt.Chart().encode(
        x=alt.X("share:Q", title="share of the differences, %"),
        y=alt.Y("knob:N", sort=list(next(iter(found.values()))), title=None, axis=alt.Axis(labelLimit=240)),
    )
    rest = alt.condition(alt.datum.knob == REST, alt.value(chart.SOFT), alt.value(chart.CSS_COLORS[0]))
    layers = bars.mark_bar().encode(color=rest), bars.mark_text(align="left", dx=3).encode(text="share:N")
    return (
        alt.layer(*layers, data=alt.InlineData(values=rows))
        .properties(width=420 / len(found), height=alt.Step(19))
        .facet(column=alt.Column("objective:N", sort=list(found), title=None))
    )


def pareto(sweep: SweepResults, *, cost: str) -> alt.TopLevelMixin | None:
    """The first objective against ``cost``."""
    scatter = pareto_scatter(sweep, cost)
    return None if scatter is None else draw_scatter(scatter)


def _bar_name(sweep: SweepResults, parameter: str) -> str:
    """A parameter of a knob keeps its own name: ``layer1.0`` of ``widths.layer1.0`` says little."""
    of_a_knob = any(parameter.startswith(f"{name}.") for name in sweep.space if parameter not in sweep.space)
    return parameter if of_a_knob else knob_label(parameter, sweep.knobs)


def _file(metric: str) -> str:
    return metric.replace("/", "_")
