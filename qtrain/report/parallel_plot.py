"""Parallel coordinates: each trial a line through what was chosen for it and what came of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, quantiles
from typing import Any

from matplotlib.figure import Figure

from qtrain.report.canvas import MARK, Theme, new_figure
from qtrain.report.curves import ticks
from qtrain.report.formatting import knob_label, knob_text, metric_label
from qtrain.report.pareto_plot import BLUE, unit_of
from qtrain.sweep.sweep_results import SweepResults
from qtrain.sweep.trial import Trial

ABSENT = -0.09
"""Where a line passes an axis whose knob did not count for its trial."""

SPREAD = 0.3
"""How far apart lines that share a word may be, as a part of the way to the next word."""


@dataclass(frozen=True)
class Axis:
    """One vertical axis: ``place`` is where a trial stands on it, 0 to 1, ``None`` where it has no value."""

    label: str
    place: Callable[[Trial], float | None]
    ticks: Sequence[tuple[float, str]]


def parallel(sweep: SweepResults, theme: Theme) -> Figure | None:
    """Knobs from left to right, then the objectives with the better end up; ``None`` where nothing differs.

    The front is drawn last and in color. A line passes below an axis whose knob did not count.
    """
    shown = [t for t in sweep.trials if t.status in ("finished", "stopped") and sweep.first in t.metrics]
    axes_ = [axis for name in sweep.knobs if (axis := _knob_axis(sweep, name, shown)) is not None]
    axes_ += [axis for name in sweep.objectives if (axis := _figure_axis(sweep, name, shown)) is not None]
    if len(axes_) < 2:
        return None
    figure = new_figure(theme, width=min(16.0, max(8.0, 1.8 * len(axes_))), height=4.6)
    axes = figure.add_subplot()
    axes.axis("off")
    axes.set_xlim(-0.45, len(axes_) - 0.6)
    absent = any(axis.place(trial) is None for axis in axes_ for trial in shown)
    axes.set_ylim(ABSENT - 0.06 if absent else -0.08, 1.14)
    for trial in sorted(shown, key=lambda trial: (trial.id in sweep.points, trial.status == "finished")):
        ys = [place if (place := axis.place(trial)) is not None else ABSENT for axis in axes_]
        best = trial.id in sweep.points
        axes.plot(
            range(len(ys)), ys, gid=f"{MARK}{sweep.numbers[trial.id]}",
            color=theme.series[BLUE] if best else theme.foreground,
            alpha=0.9 if best else 0.28 if trial.status == "finished" else 0.14,
            linewidth=2.0 if best else 1.0, zorder=3 if best else 2,
        )  # fmt: skip
    for x, axis in enumerate(axes_):
        axes.plot([x, x], [0, 1], color=theme.foreground, linewidth=1, alpha=0.7, zorder=4)
        axes.annotate(axis.label, (x, 1.07), ha="center", color=theme.foreground, fontsize=9, fontweight="bold")
        for y, text in axis.ticks:
            axes.annotate(
                text, (x, y), xytext=(-5, 0), textcoords="offset points", ha="right", va="center", zorder=5,
                color=theme.foreground, fontsize=8,
                bbox={"boxstyle": "round,pad=0.12", "facecolor": theme.background, "edgecolor": "none", "alpha": 0.75},
            )  # fmt: skip
        if any(axis.place(trial) is None for trial in shown):
            axes.annotate("not set", (x, ABSENT), xytext=(-5, 0), textcoords="offset points", ha="right", va="center",
                          color=theme.foreground, fontsize=8)  # fmt: skip
    return figure


def _knob_axis(sweep: SweepResults, name: str, trials: Sequence[Trial]) -> Axis | None:
    """The axis of a knob, the mean of one with several parameters; ``None`` where all trials have the same."""
    found = {trial.id: sweep.chosen(trial) for trial in trials}
    chosen: dict[str, Any] = {id: knobs[name] for id, knobs in found.items() if name in knobs}
    label = knob_label(name, sweep.knobs)
    if any(isinstance(value, list) for value in chosen.values()):
        if not all(_is_number(part) for value in chosen.values() for part in value):
            return None
        chosen, label = {id: fmean(value) for id, value in chosen.items()}, f"{label}, mean"
    values = set(map(knob_text, chosen.values()))
    if len(values) < 2:
        return None
    if all(map(_is_number, chosen.values())):
        return _number_axis(label, {id: float(value) for id, value in chosen.items()})
    return _word_axis(sweep, label, {id: knob_text(value) for id, value in chosen.items()}, trials)


def _number_axis(label: str, values: dict[str, float]) -> Axis:
    """A scale from the least to the most, logarithmic where that spans a decade; up to six values are all named."""
    different = sorted(set(values.values()))
    low, high = min(values.values()), max(values.values())
    log = low > 0 and high / low >= 10

    def share(value: float) -> float:
        return math.log(value / low) / math.log(high / low) if log else (value - low) / (high - low)

    marks = different
    if len(different) > 6:
        marks = [low, high, *(_decades(low, high) if log else ticks(low, high, most=4))]
    places = [(share(value), knob_text(value)) for value in marks]
    return Axis(label, lambda trial: share(values[trial.id]) if trial.id in values else None, _apart(places))


def _word_axis(sweep: SweepResults, label: str, words: dict[str, str], trials: Sequence[Trial]) -> Axis:
    """Words evenly spaced; lines of one word lie side by side in the order of what came of them."""
    known = sorted(set(words.values()))
    sign = 1 if sweep.direction(sweep.first) == "max" else -1
    places = {}
    for at, word in enumerate(known):
        members = [trial for trial in trials if words.get(trial.id) == word]
        members.sort(key=lambda trial: sign * trial.metrics[sweep.first])
        for rank, trial in enumerate(members):
            aside = SPREAD / len(known) * ((rank + 0.5) / len(members) - 0.5)
            places[trial.id] = (at + 0.5) / len(known) + aside
    marks = [((at + 0.5) / len(known), word) for at, word in enumerate(known)]
    return Axis(label, lambda trial: places.get(trial.id), marks)


def _figure_axis(sweep: SweepResults, name: str, trials: Sequence[Trial]) -> Axis | None:
    """An objective, its better end up. Outliers at the worse end stand there together, and so does its tick."""
    values = {trial.id: trial.metrics[name] for trial in trials if name in trial.metrics}
    if len(set(values.values())) < 2:
        return None
    unit, sign = unit_of(name), 1.0 if sweep.direction(name) == "max" else -1.0
    signed = {id: sign * unit * value for id, value in values.items()}
    high, worst = max(signed.values()), min(signed.values())
    low = worst
    if len(signed) >= 8:
        first, _, third = quantiles(signed.values(), n=4)
        low = max(worst, first - 1.5 * (third - first))  # a collapsed trial would press the others together

    def share(value: float) -> float:
        return max(0.0, (value - low) / (high - low))

    beyond = ("≤ " if sign > 0 else "≥ ") if low > worst else ""
    marks = [(1.0, f"{sign * high:.4g}"), (0.0, f"{beyond}{sign * low:.4g}")]
    marks += [
        (share(sign * value), f"{value:.4g}")
        for value in ticks(min(sign * low, sign * high), max(sign * low, sign * high))
    ]
    label = "size, kB" if name == "size_bytes" else metric_label(name)
    return Axis(label, lambda trial: share(signed[trial.id]) if trial.id in signed else None, _apart(marks))


def _decades(low: float, high: float) -> list[float]:
    return [10.0**power for power in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)]


def _apart(marks: Sequence[tuple[float, str]], least: float = 0.07) -> list[tuple[float, str]]:
    """``marks`` of which none overlaps one before it in the list."""
    kept: list[tuple[float, str]] = []
    for place, text in marks:
        if all(abs(place - other) >= least for other, _ in kept):
            kept.append((place, text))
    return kept


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
