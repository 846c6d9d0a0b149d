"""Pictures in which each trial of a sweep is a line: learning curves and parallel coordinates."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from statistics import fmean, quantiles
from typing import Any, cast

import altair as alt

from qtrain.report import chart
from qtrain.report.formatting import knob_label, knob_text, metric_label
from qtrain.report.pareto_plot import FINISHED, FRONT, STOPPED, axis_label, resolution_of, unit_of
from qtrain.report.placing import bundle_text, bundles, spread
from qtrain.report.scatter import reach_of
from qtrain.sweep.domains import is_number
from qtrain.sweep.sweep_results import SweepResults
from qtrain.sweep.trial import Trial

ABSENT = -0.09
"""Where a line passes an axis whose knob did not count for its trial: a bit below 0, the lower end of the axis."""

SPREAD = 0.3
"""Lines that share a word lie side by side within this part of the way to the next word."""

AXIS_DISTANCE = 150
"""Pixels from one axis to the next."""

LABEL_DISTANCE = 0.04
"""Numbers of curves that end near each other are at least this part of the picture's height apart."""

OPACITY = {STOPPED: 0.16, FINISHED: 0.32, FRONT: 0.95}
"""How strong the line of a trial is, by its kind; the front is blue and drawn last."""


@dataclass(frozen=True)
class TrialLine:
    """The points of trial ``number``; ``place`` is its place on the front, if it is there."""

    number: int
    kind: str
    place: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class KnobAxis:
    """A vertical axis from ``bottom`` to ``top``; ``values`` are by trial. ``words`` stand at 0, 1, 2 and so on.

    ``whole``: all values are whole numbers, which the axis shows with all their digits.
    """

    label: str
    values: Mapping[str, float]
    bottom: float
    top: float
    log: bool = False
    whole: bool = False
    words: Sequence[str] = ()

    def height(self, trial: Trial) -> float:
        """Where ``trial`` stands, 0 to 1; :data:`ABSENT` without a value, 0 for what lies below the axis."""
        if trial.id not in self.values:
            return ABSENT
        value = self.values[trial.id]
        if self.log:
            return math.log(value / self.bottom) / math.log(self.top / self.bottom)
        return max(0.0, (value - self.bottom) / (self.top - self.bottom))


def learning_curves(sweep: SweepResults) -> alt.TopLevelMixin | None:
    """The first objective by epoch; ``None`` where no curve has two points."""
    lines = curve_lines(sweep)
    if not lines:
        return None
    x = alt.X("x:Q", title="epochs", scale=alt.Scale(nice=False), axis=alt.Axis(tickMinStep=1))
    low, high = _curve_limits(lines, resolution_of(sweep.first))
    y = alt.Y("y:Q", title=axis_label(sweep.first), scale=alt.Scale(domain=[low, high], nice=False))
    places = alt.Chart(alt.InlineData(values=_end_labels(lines, low, high))).mark_text(
        align="left", dx=6, color=chart.CSS_COLORS[0]
    )
    layers = [_lines(lines, point=True).encode(x, y), places.encode(x, y, text="place:N")]
    return alt.layer(*layers).properties(width="container", height=330)


def parallel(sweep: SweepResults) -> alt.TopLevelMixin | None:
    """Each trial a line through its knobs and objectives, whose better end is up; ``None`` where nothing differs."""
    axes = parallel_axes(sweep)
    if len(axes) < 2:
        return None
    lines = parallel_lines(sweep, axes)
    x = alt.X("x:Q", axis=None, scale=alt.Scale(domain=[0, len(axes) - 1], nice=False))
    y = alt.Y("y:Q", axis=None, scale=alt.Scale(domain=[0, 1], nice=False))
    layers: list[Any] = [_lines(lines).encode(x, y)]
    unset = alt.InlineData(
        values=[{"x": x, "y": y} for x, y in {p for line in lines for p in line.points} if y == ABSENT]
    )
    layers.append(alt.Chart(unset).mark_text(text="not set", align="right", dx=-6).encode(x, y))
    for place, axis in enumerate(axes):
        scale = alt.Scale(domain=[axis.bottom, axis.top], nice=False, type="log" if axis.log else "linear")
        looks: dict[str, Any] = {"tickCount": 3 if axis.log else 5, "format": ".4~g", "labelOverlap": True}
        if axis.whole:
            looks |= {"format": "d"}
            if axis.top - axis.bottom < 5:  # else steps are whole by themselves
                looks |= {"values": list(range(round(axis.bottom), round(axis.top) + 1))}
        if axis.words:
            looks = {"values": list(range(len(axis.words))), "labelExpr": f"{list(axis.words)!r}[datum.value]"}
        ruler = alt.Axis(
            orient="left", offset=-place * AXIS_DISTANCE, grid=False, domain=True, ticks=True, domainColor=chart.SOFT,
            tickColor=chart.SOFT, titleAngle=0, titleAlign="center", titleX=0, titleY=-14, **looks,
        )  # fmt: skip
        ends = alt.InlineData(values=[{"y": axis.bottom}, {"y": axis.top}])
        layers.append(
            alt.Chart(ends).mark_point(opacity=0).encode(alt.Y("y:Q", title=axis.label, scale=scale, axis=ruler))
        )
    made: alt.LayerChart = alt.layer(*layers).resolve_scale(y="independent")
    return made.properties(width=AXIS_DISTANCE * (len(axes) - 1), height=330)


def curve_lines(sweep: SweepResults) -> list[TrialLine]:
    """The first objective by epoch, of trials whose runs are still there; empty where no curve has two points."""
    unit = unit_of(sweep.first)
    found = {t.id: [(x, unit * y) for x, y in sweep.curve(t)] for t in sweep.trials if t.status != "duplicate"}
    if all(len(curve) < 2 for curve in found.values()):
        return []
    return [_line(sweep, trial, found[trial.id]) for trial in _front_last(sweep) if found.get(trial.id)]


def parallel_axes(sweep: SweepResults) -> list[KnobAxis]:
    """Knobs in the order of the space, then the objectives; what is the same for all trials has no axis."""
    trials = _comparable(sweep)
    axes = [_knob_axis(sweep, name, trials) for name in sweep.knobs]
    axes += [_metric_axis(sweep, name, trials) for name in sweep.objectives]
    return [axis for axis in axes if axis is not None]


def parallel_lines(sweep: SweepResults, axes: Sequence[KnobAxis]) -> list[TrialLine]:
    trials = {trial.id for trial in _comparable(sweep)}
    return [
        _line(sweep, trial, [(x, axis.height(trial)) for x, axis in enumerate(axes)])
        for trial in _front_last(sweep)
        if trial.id in trials
    ]


def _line(sweep: SweepResults, trial: Trial, points: Sequence[tuple[float, float]]) -> TrialLine:
    kind = FRONT if trial.id in sweep.points else FINISHED if trial.status == "finished" else STOPPED
    return TrialLine(sweep.numbers[trial.id], kind, str(sweep.points.get(trial.id, "")), points)


def _front_last(sweep: SweepResults) -> list[Trial]:
    return sorted(sweep.trials, key=lambda trial: (trial.id in sweep.points, trial.status == "finished"))


def _comparable(sweep: SweepResults) -> list[Trial]:
    return [t for t in sweep.trials if t.status in ("finished", "stopped") and sweep.first in t.metrics]


def _lines(lines: Sequence[TrialLine], *, point: bool = False) -> alt.Chart:
    """``lines`` in the colors of their kinds; the chosen trial is thick and orange."""
    rows = [
        {"x": x, "y": y, "trial": line.number, "opacity": OPACITY[line.kind], "front": line.kind == FRONT}
        for line in lines
        for x, y in line.points
    ]
    colors = [
        {"test": chart.CHOSEN, "value": chart.CSS_COLORS[1]},
        {"test": "datum.front", "value": chart.CSS_COLORS[0]},
    ]
    made: alt.Chart = (
        alt.Chart(alt.InlineData(values=rows))
        .mark_line(point=alt.OverlayMarkDef(size=22) if point else False, clip=point)
        .encode(
            detail="trial:N",
            tooltip="trial:N",
            color=alt.ColorValue(chart.INK, condition=colors),
            # Not ``opacity``, for which a PNG takes a picture of its own of each line, and seconds.
            strokeOpacity=alt.StrokeOpacity("opacity:Q", scale=None, legend=None),
            fillOpacity=alt.FillOpacity("opacity:Q", scale=None, legend=None),
            strokeWidth=alt.condition(f"datum.front || {chart.CHOSEN}", alt.value(2.5), alt.value(1)),
        )
    )
    return made


def _end_labels(lines: Sequence[TrialLine], low: float, high: float) -> list[dict[str, object]]:
    """The places of the front beside the ends of its curves, from ``low`` to ``high``; neighbors share a label where
    there are too many."""
    ends = sorted(((line.points[-1][1], line) for line in lines if line.place), key=itemgetter(0))
    labels = [[ends[i] for i in bundle] for bundle in bundles(len(ends), int(1 / LABEL_DISTANCE))]
    distance = LABEL_DISTANCE * (high - low)
    middles = [fmean(value for value, _ in label) for label in labels]
    heights = spread(middles, distance=distance, low=low + distance / 2, high=high - distance / 2)
    return [
        {
            "x": max(line.points[-1][0] for _, line in label),
            "y": height,
            "place": bundle_text([line.place for _, line in reversed(label)]),
        }
        for label, height in zip(labels, heights, strict=True)
    ]


def _curve_limits(lines: Sequence[TrialLine], resolution: float) -> tuple[float, float]:
    """Show the front's curves in full; trials far below would press them together. Without a front, show all curves."""
    values = [y for line in lines for _, y in line.points]
    best = [y for line in lines if line.kind == FRONT for _, y in line.points] or values
    reach = reach_of(best, resolution)
    bottom, top = max(min(values), min(best) - 0.1 * reach), min(max(values), max(best) + 0.1 * reach)
    return bottom - 0.05 * reach, top + 0.07 * reach


def _knob_axis(sweep: SweepResults, name: str, trials: Sequence[Trial]) -> KnobAxis | None:
    """The axis of a knob, the mean of one with several parameters. Of lists and single values it is one of words."""
    chosen = {trial.id: knobs[name] for trial in trials if name in (knobs := sweep.chosen(trial))}
    label = knob_label(name, sweep.knobs)
    if all(isinstance(value, list) for value in chosen.values()):
        lists = cast("Mapping[str, Sequence[float]]", chosen)
        if not all(is_number(part) for value in lists.values() for part in value):
            return None
        chosen, label = {id: fmean(value) for id, value in lists.items()}, f"{label}, mean"
    found = list(chosen.values())
    if all(value == found[0] for value in found):
        return None
    numbers = {id: value for id, value in chosen.items() if is_number(value)}
    if len(numbers) == len(chosen):
        low, high = min(numbers.values()), max(numbers.values())
        whole = all(isinstance(value, int) for value in found)
        return KnobAxis(label, numbers, low, high, log=low > 0 and high / low >= 10, whole=whole)
    words, cut = ({id: knob_text(value, whole=whole) for id, value in chosen.items()} for whole in (True, False))
    # Words that are alike only where they are cut stay apart.
    return _word_axis(sweep, label, cut if len(set(cut.values())) == len(set(words.values())) else words, trials)


def _word_axis(sweep: SweepResults, label: str, chosen: Mapping[str, str], trials: Sequence[Trial]) -> KnobAxis:
    """Words evenly spaced; lines of one word lie side by side in the order of what they reached."""
    words = sorted(set(chosen.values()))
    sign = 1 if sweep.direction(sweep.first) == "max" else -1
    values = {}
    for place, word in enumerate(words):
        members = [trial for trial in trials if chosen.get(trial.id) == word]
        members.sort(key=lambda trial: sign * trial.metrics[sweep.first])
        for rank, trial in enumerate(members):
            values[trial.id] = place + SPREAD * ((rank + 0.5) / len(members) - 0.5)
    return KnobAxis(label, values, -0.5, len(words) - 0.5, words=words)


def _metric_axis(sweep: SweepResults, name: str, trials: Sequence[Trial]) -> KnobAxis | None:
    """An objective with its better end up. Outliers at the worse end stand there together."""
    unit, sign = unit_of(name), 1.0 if sweep.direction(name) == "max" else -1.0
    values = {trial.id: unit * trial.metrics[name] for trial in trials if name in trial.metrics}
    if len(set(values.values())) < 2:
        return None
    signed = sorted(sign * value for value in values.values())
    worst = signed[0]
    if len(signed) >= 8:
        first, _, third = quantiles(signed, n=4)
        # A collapsed trial would press the others together.
        worst = max(worst, first - 1.5 * (third - first))
    if worst == signed[-1]:  # most are as good as the best
        worst = signed[0]
    label = "size, kB" if name == "size_bytes" else metric_label(name)
    return KnobAxis(label, values, sign * worst, sign * signed[-1])
