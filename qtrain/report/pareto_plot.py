"""The picture that decides: what was wanted first of all against one of its costs, the front marked.

One language in all pictures of a sweep: filled and blue is on the front, with its number there; gray and open was
trained to its end, a small gray dot was stopped before; an orange diamond has the same bits in all layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from qtrain.report.canvas import MARK, Theme, dress, new_figure, place_labels
from qtrain.report.formatting import bits_text, metric_label, uniform_bits
from qtrain.sweep.pareto import front
from qtrain.sweep.sweep_results import SweepResults
from qtrain.sweep.trial import Trial

UNITS = {
    "top1": ("top-1 accuracy on validation images, %", 1.0),
    "best_top1": ("best top-1 accuracy on validation images, %", 1.0),
    "test_top1": ("top-1 accuracy on test images, %", 1.0),
    "size_bytes": ("size, kB", 1e-3),
    "bops": ("bit operations of one image, GBOPs (10⁹)", 1e-9),
    "effective_bits": ("stored bits per weight", 1.0),
}
"""Figure -> the name of its axis, and what its values are multiplied by; any other is drawn as it is."""

LOGARITHMIC = 3.0
"""A cost axis is logarithmic where its largest value is so many times its smallest."""

REACH = 0.4
"""So much of the front's own height is shown below its lowest point; what is worse stands on the lower edge."""

BLUE, ORANGE = 0, 1
"""Places of the two colors in a theme's series."""


def planes(sweep: SweepResults) -> list[str]:
    """The costs that the first objective is drawn against: size, bit operations, and further objectives."""
    costs = dict.fromkeys(["size_bytes", "bops", *sweep.objectives])
    return [cost for cost in costs if cost != sweep.first and any(_drawn(sweep, trial, cost) for trial in sweep.trials)]


def against(sweep: SweepResults, cost: str, theme: Theme) -> Figure | None:
    """The first objective of ``sweep`` against ``cost``; ``None`` where no trial that finished has both.

    The line is what is best at each cost among the trials that finished. It passes through all numbered points only
    where the sweep's objectives are the two that are drawn.
    """
    shown = [trial for trial in sweep.trials if _drawn(sweep, trial, cost)]
    finished = [trial for trial in shown if trial.status == "finished"]
    if not finished:
        return None
    figure = new_figure(theme)
    axes = figure.add_subplot()
    dress(axes, theme, x=axis_label(cost), y=axis_label(sweep.first))
    best = front(finished, {sweep.first: sweep.direction(sweep.first), cost: sweep.direction(cost)})
    edge = _set_limits(axes, sweep, shown, best, cost)

    def place(trial: Trial) -> tuple[float, float]:
        value = unit_of(sweep.first) * trial.metrics[sweep.first]
        inside = max if sweep.direction(sweep.first) == "max" else min
        return unit_of(cost) * trial.metrics[cost], inside(value, edge)

    def beyond(trial: Trial) -> bool:
        return place(trial)[1] != unit_of(sweep.first) * trial.metrics[sweep.first]

    _stairs(axes, [place(trial) for trial in best], theme, cheap_left=sweep.direction(cost) == "min")
    labels = []
    for trial in sorted(shown, key=lambda trial: (trial.id in sweep.points, trial.status == "finished")):
        x, y = place(trial)
        kind = _kind(sweep, trial)
        style = STYLES[kind](theme)
        if beyond(trial) and kind in ("finished", "stopped"):
            style |= {"marker": "v" if sweep.direction(sweep.first) == "max" else "^", "clip_on": False}
        axes.plot(x, y, linestyle="None", gid=f"{MARK}{sweep.numbers[trial.id]}", **style)
        uniform = uniform_bits(trial) is not None and trial.status == "finished"
        if uniform:
            axes.plot(x, y, linestyle="None", gid=f"{MARK}{sweep.numbers[trial.id]}", **STYLES["uniform"](theme))
            labels.append((bits_text(trial), x, y, theme.series[ORANGE]))
        if trial.id in sweep.points:
            labels.append((str(sweep.points[trial.id]), x, y, theme.series[BLUE]))
    _full_precision(axes, sweep, theme)
    cut = any(map(beyond, shown))
    _legend(axes, [_kind(sweep, trial) for trial in shown], theme, uniform=_any_uniform(finished), cut=cut)
    place_labels(axes, _once(labels))
    return figure


def axis_label(figure: str) -> str:
    return UNITS[figure][0] if figure in UNITS else metric_label(figure)


STYLES: dict[str, Callable[[Theme], dict[str, Any]]] = {
    "front": lambda theme: {
        "marker": "o", "markersize": 9, "color": theme.series[BLUE], "markeredgewidth": 0, "zorder": 4,
    },
    "finished": lambda theme: {
        "marker": "o", "markersize": 6, "color": theme.foreground, "markerfacecolor": theme.background,
        "markeredgewidth": 1.2, "alpha": 0.55, "zorder": 3,
    },
    "stopped": lambda theme: {
        "marker": "o", "markersize": 3.5, "color": theme.foreground, "markeredgewidth": 0, "alpha": 0.35, "zorder": 2,
    },
    "uniform": lambda theme: {
        "marker": "D", "markersize": 12, "color": theme.series[ORANGE], "markerfacecolor": "none",
        "markeredgewidth": 1.6, "zorder": 5,
    },
}  # fmt: skip
"""How a trial of each kind is drawn."""

WORDS = {
    "front": "on the front",
    "finished": "trained to its end",
    "stopped": "stopped before",
    "uniform": "the same bits in all inner layers",
}


def _kind(sweep: SweepResults, trial: Trial) -> str:
    return "front" if trial.id in sweep.points else trial.status


def _drawn(sweep: SweepResults, trial: Trial, cost: str) -> bool:
    known = sweep.first in trial.metrics and cost in trial.metrics
    return known and trial.status in ("finished", "stopped")


def _any_uniform(trials: Iterable[Trial]) -> bool:
    return any(uniform_bits(trial) is not None for trial in trials)


def unit_of(figure: str) -> float:
    """What values of ``figure`` are multiplied by to be drawn."""
    return UNITS.get(figure, ("", 1.0))[1]


def _once(labels: list[tuple[str, float, float, str]]) -> list[tuple[str, float, float, str]]:
    """Several trials of the same bits are named at the best of them; places of one text are told apart."""
    kept: dict[str, tuple[str, float, float, str]] = {}
    for label in labels:
        if label[0] not in kept or label[2] > kept[label[0]][2]:
            kept[label[0]] = label
    return list(kept.values())


def _set_limits(axes: Axes, sweep: SweepResults, shown: Sequence[Trial], best: Sequence[Trial], cost: str) -> float:
    """Limits that show the front and the uniform models well; returns the worst value that is drawn where it is.

    A model that collapsed to chance lies tens of points below, and would press all others together.
    """
    sign = 1 if sweep.direction(sweep.first) == "max" else -1
    values = {trial.id: sign * unit_of(sweep.first) * trial.metrics[sweep.first] for trial in shown}
    ours = [values[trial.id] for trial in shown if trial.id in sweep.points or trial in best]
    ours += [v for t in shown if t.status == "finished" and uniform_bits(t) and (v := values[t.id]) > min(ours) - 15]
    ours += [sign * unit_of(sweep.first) * top1 for top1 in _references(sweep)]
    reach = max(max(ours) - min(ours), 0.02 * abs(max(ours)), 1e-9)
    lowest = max(min(values.values()), min(ours) - REACH * reach)
    low, high = lowest - 0.08 * reach, max(ours) + 0.14 * reach
    axes.set_ylim(*sorted((sign * low, sign * high)))
    xs = [unit_of(cost) * trial.metrics[cost] for trial in shown]
    if min(xs) > 0 and max(xs) / min(xs) >= LOGARITHMIC:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
        margin = (max(xs) / min(xs)) ** 0.05
        axes.set_xlim(min(xs) / margin, max(xs) * margin)
        if len([tick for tick in axes.get_xticks() if min(xs) <= tick <= max(xs)]) < 2:
            axes.xaxis.set_major_locator(FixedLocator([min(xs), max(xs)]))
    else:
        axes.margins(x=0.06)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    return sign * lowest


def _stairs(axes: Axes, points: Sequence[tuple[float, float]], theme: Theme, *, cheap_left: bool) -> None:
    """What is best at each cost: level until a costlier model is better."""
    ordered = sorted(set(points))
    path = ordered[:1]
    for (x0, y0), (x1, y1) in pairwise(ordered):
        path += [(x1, y0) if cheap_left else (x0, y1), (x1, y1)]
    xs, ys = zip(*path, strict=True)
    axes.plot(xs, ys, color=theme.series[BLUE], linewidth=1.4, alpha=0.55, zorder=1)


def _references(sweep: SweepResults) -> list[float]:
    """The full-precision model's own accuracy on the same images, where it is known and comparable."""
    known = [trial.metrics["fp_top1"] for trial in sweep.trials if "fp_top1" in trial.metrics]
    return known[:1] if sweep.first == "top1" and all(math.isclose(value, known[0]) for value in known) else []


def _full_precision(axes: Axes, sweep: SweepResults, theme: Theme) -> None:
    for top1 in _references(sweep):
        axes.axhline(top1, color=theme.foreground, linewidth=1, linestyle=(0, (1, 2)))
        text = f"full precision {top1:.2f} %"
        axes.annotate(
            text, (0, top1), xycoords=("axes fraction", "data"), xytext=(2, 3), textcoords="offset points",
            ha="left", color=theme.foreground, fontsize=9,
        )  # fmt: skip


def _legend(axes: Axes, kinds: Sequence[str], theme: Theme, *, uniform: bool, cut: bool) -> None:
    present = [kind for kind in STYLES if kind in kinds or (kind == "uniform" and uniform)]
    handles = []
    for kind in present:
        style = STYLES[kind](theme) | {"zorder": 1, "markersize": min(8, STYLES[kind](theme)["markersize"])}
        handles.append(Line2D([], [], linestyle="None", label=WORDS[kind], **style))
    if cut:
        handles.append(
            Line2D([], [], linestyle="None", marker="v", markersize=5, color=theme.foreground, alpha=0.55,
                   label="off the scale")
        )  # fmt: skip
    axes.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3, frameon=False,
        labelcolor=theme.foreground, fontsize=9,
    )  # fmt: skip
