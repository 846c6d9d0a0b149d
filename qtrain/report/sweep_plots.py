"""All pictures of a sweep, in the order in which the page shows them; the two simpler ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from qtrain.report.bits_plot import layer_bits
from qtrain.report.canvas import MARK, Theme, dress, new_figure
from qtrain.report.formatting import knob_label, metric_label
from qtrain.report.parallel_plot import parallel
from qtrain.report.pareto_plot import BLUE, against, axis_label, planes, unit_of
from qtrain.sweep.sweep_results import SweepResults

MOST_BARS = 24
"""Knobs that the picture of importance shows; bits of many layers are many knobs."""


@dataclass(frozen=True)
class Plot:
    """A picture: ``name`` is its file's without ``.png``; ``note`` says on the page how to read it.

    A ``half`` one shares its line with another where the page is wide. Those that decide come first, the front's
    table after them.
    """

    name: str
    title: str
    note: str
    draw: Callable[[SweepResults, Theme], Figure | None]
    half: bool = False
    decides: bool = False


def plots(sweep: SweepResults) -> Iterator[Plot]:
    """The pictures that may be drawn of ``sweep``; one of which there is nothing to see draws ``None``."""
    first = metric_label(sweep.first).removesuffix(" %")
    for cost in planes(sweep):
        label = metric_label(cost)
        yield Plot(
            f"{_file(sweep.first)}_vs_{_file(cost)}",
            f"{first[0].upper()}{first[1:]} against {label}",
            f"The line is the best {first} at each {label}. Numbers are places on the front.",
            partial(_against, cost=cost),
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
        "What was chosen, and what came of it",
        "Each trial is a line, those of the front are blue; objectives have their better end up. A line passes below a "
        "knob that did not count.",
        parallel,
    )
    yield Plot(
        "importance",
        "Importance of each knob",
        "How much of the differences between finished trials each knob explains, alone and with the others.",
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


def _against(sweep: SweepResults, theme: Theme, *, cost: str) -> Figure | None:
    return against(sweep, cost, theme)


def learning_curves(sweep: SweepResults, theme: Theme) -> Figure | None:
    """The first objective by epoch, of trials whose runs are still there; ``None`` where no curve has two points."""
    unit = unit_of(sweep.first)
    curves = {t.id: [(x, unit * y) for x, y in sweep.curve(t)] for t in sweep.trials if t.status != "duplicate"}
    curves = {id: curve for id, curve in curves.items() if curve}
    if all(len(curve) < 2 for curve in curves.values()):
        return None
    figure = new_figure(theme)
    axes = figure.add_subplot()
    dress(axes, theme, x="epochs", y=axis_label(sweep.first))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    labels = []
    for trial in sorted(sweep.trials, key=lambda trial: trial.id in sweep.points):
        if trial.id not in curves:
            continue
        best, curve = trial.id in sweep.points, curves[trial.id]
        axes.plot(
            *zip(*curve, strict=True), gid=f"{MARK}{sweep.numbers[trial.id]}", marker="o",
            markersize=4 if best else 2.5, color=theme.series[BLUE] if best else theme.foreground,
            linewidth=2.0 if best else 1.0, alpha=1 if best else 0.3, zorder=3 if best else 2,
        )  # fmt: skip
        if best:
            labels.append((str(sweep.points[trial.id]), curve[-1][1]))
    _set_height(
        axes, curves.values(), [y for id in sweep.points for _, y in curves.get(id, next(iter(curves.values())))]
    )
    _end_labels(axes, labels, theme)
    return figure


def importance(sweep: SweepResults, theme: Theme) -> Figure | None:
    """Bars, one panel for each objective, the knobs in the order of the first; ``None`` where nothing is explained."""
    found = {name: shares for name in sweep.objectives if (shares := sweep.importance(name))}
    if not found:
        return None
    first = next(iter(found.values()))
    knobs = sorted(first, key=lambda knob: -first[knob])[:MOST_BARS]
    figure = new_figure(theme, width=8, height=1.1 + 0.27 * len(knobs))
    panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for axes, (objective, shares) in zip(panels, found.items(), strict=True):
        dress(axes, theme, x="share of the differences, %")
        axes.set_title(metric_label(objective), loc="left", color=theme.foreground, fontsize=10)
        axes.grid(visible=False, axis="y")
        values = [100 * shares.get(knob, 0.0) for knob in knobs]
        axes.barh(range(len(knobs)), values, height=0.62, color=theme.series[BLUE])
        for y, value in enumerate(values):
            axes.annotate(
                f"{value:.0f}", (value, y), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8,
                color=theme.foreground,
            )  # fmt: skip
        axes.set_xlim(0, 1.12 * max(100 * max(shares.values()) for shares in found.values()))
        axes.set_yticks(range(len(knobs)), [_bar_name(sweep, knob) for knob in knobs])
    panels[0].invert_yaxis()
    return figure


def _bar_name(sweep: SweepResults, parameter: str) -> str:
    """A parameter of a knob keeps its own name: ``layer1.0`` of ``widths.layer1.0`` says little."""
    of_a_knob = any(parameter.startswith(f"{name}.") for name in sweep.space if parameter not in sweep.space)
    return parameter if of_a_knob else knob_label(parameter, sweep.knobs)


def _end_labels(axes: Axes, labels: Sequence[tuple[str, float]], theme: Theme, *, least: float = 0.03) -> None:
    """Write each (text, y) to the right of the plot at its height, ``least`` of the plot's height apart."""
    bottom, top = axes.get_ylim()
    height = math.inf
    for text, y in sorted(labels, key=lambda label: -label[1]):
        height = min((y - bottom) / (top - bottom), height - least)
        axes.annotate(
            text, (1.005, height), xycoords="axes fraction", va="center", fontsize=9, color=theme.series[BLUE]
        )


def _set_height(axes: Axes, curves: Iterable[Sequence[tuple[float, float]]], best: list[float]) -> None:
    """Show the front's curves in full; trials far below them would press all together. Without a front, all curves."""
    values = [value for curve in curves for _, value in curve]
    low, high = min(best or values), max(best or values)
    reach = max(high - low, 0.02 * abs(high), 1e-9)
    bottom = max(min(values), low - 0.1 * reach)
    top = min(max(values), high + 0.1 * reach)
    axes.set_ylim(bottom - 0.05 * reach, top + 0.07 * reach)


def _file(figure: str) -> str:
    return figure.replace("/", "_")
