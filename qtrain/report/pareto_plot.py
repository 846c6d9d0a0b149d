"""The first objective of a sweep against one of its costs, with the front marked.

The signs: a filled blue point is on the front and has its number there; an open gray one was trained to its end; a
small gray one was stopped before; an orange diamond has the same bits in all inner layers.
"""

import math

from qtrain.report.formatting import bits_text, metric_label, uniform_bits
from qtrain.report.scatter import POINTS, Mark, Scatter, ScatterPoint, y_limits
from qtrain.sweep.pareto import front
from qtrain.sweep.sweep_results import SweepResults
from qtrain.sweep.trial import Trial

UNITS = {
    "top1": ("top-1 accuracy on validation images, %", 1.0),
    "best_top1": ("best top-1 accuracy on validation images, %", 1.0),
    "test_top1": ("top-1 accuracy on test images, %", 1.0),
    "size_bytes": ("size, kB", 1e-3),
    "bops": ("bit operations of one image, billions (GBOPs)", 1e-9),
    "effective_bits": ("stored bits per weight", 1.0),
}
"""Metric -> the name of its axis, and what its values are multiplied by; any other metric is drawn as it is."""

FRONT, FINISHED, STOPPED = "on the front", "trained to its end", "stopped before"
UNIFORM, BEYOND = "the same bits in all inner layers", "off the scale"

NEAR = 15.0
"""A uniform model counts for the limits of the plot if it is at most this far below the front, in points."""


def planes(sweep: SweepResults) -> list[str]:
    """The costs that the first objective is drawn against: size, bit operations, and further objectives."""
    costs = dict.fromkeys(["size_bytes", "bops", *sweep.objectives])
    return [cost for cost in costs if cost != sweep.first and any(_drawn(sweep, trial, cost) for trial in sweep.trials)]


def pareto_scatter(sweep: SweepResults, cost: str) -> Scatter | None:
    """The first objective against ``cost``; ``None`` where no finished trial has both.

    The stairs are the best value at each cost among the finished trials. They pass through all numbered points only
    where the two metrics are the only objectives of the sweep.
    """
    first, unit = sweep.first, unit_of(sweep.first)
    shown = [trial for trial in sweep.trials if _drawn(sweep, trial, cost)]
    finished = [trial for trial in shown if trial.status == "finished"]
    if not finished:
        return None
    best = front(finished, {first: sweep.direction(first), cost: sweep.direction(cost)})
    sign = 1 if sweep.direction(first) == "max" else -1
    heights = {trial.id: sign * unit * trial.metrics[first] for trial in shown}
    references = _full_precision(sweep)
    important = [heights[trial.id] for trial in shown if trial.id in sweep.points or trial in best]
    least = min(important) - NEAR
    important += [heights[t.id] for t in finished if uniform_bits(t) and heights[t.id] > least]
    important += [sign * unit * value for value in references]
    low, high, floor = y_limits(important, heights.values(), resolution=resolution_of(first))

    def point(trial: Trial, kind: str, label: str = "") -> ScatterPoint:
        number = sweep.numbers[trial.id]
        y = sign * max(heights[trial.id], floor)
        return ScatterPoint(unit_of(cost) * trial.metrics[cost], y, kind, label.strip(), str(number), number)

    named: dict[str, Trial] = {}
    for trial in sorted(finished, key=lambda trial: heights[trial.id]):
        if uniform_bits(trial) is not None:  # of several trials with the same bits the best one is named
            named[bits_text(trial)] = trial
    points = []
    for trial in shown:
        on_front = trial.id in sweep.points
        kind = FRONT if on_front else FINISHED if trial.status == "finished" else STOPPED
        bits = bits_text(trial) if trial in named.values() else ""
        beyond = not on_front and heights[trial.id] < floor
        points.append(point(trial, BEYOND if beyond else kind, f"{sweep.points[trial.id]} {bits}" if on_front else ""))
        if trial.status == "finished" and uniform_bits(trial) is not None:
            points.append(point(trial, UNIFORM, "" if on_front else bits))
    return Scatter(
        x=axis_label(cost),
        y=axis_label(first),
        points=points,
        marks={
            STOPPED: Mark("dot", size=4, opacity=0.4),
            FINISHED: Mark("ring", size=7, opacity=0.6),
            BEYOND: Mark("down" if sign > 0 else "up", size=5, opacity=0.6),
            FRONT: Mark("dot", size=9, color=0),
            UNIFORM: Mark("frame", size=12, color=1),
        },
        y_range=(sign * low, sign * high),
        stairs=sorted({(p.x, p.y) for p in (point(trial, FRONT) for trial in best)}),
        level_first=sweep.direction(cost) == "min",
        references=[(value, f"full precision {value:.2f} %", None) for value in references],
    )


def axis_label(metric: str) -> str:
    return UNITS[metric][0] if metric in UNITS else metric_label(metric)


def unit_of(metric: str) -> float:
    """What values of ``metric`` are multiplied by to be drawn."""
    return UNITS.get(metric, ("", 1.0))[1]


def resolution_of(metric: str) -> float:
    """The least difference of ``metric`` that means something, in the unit in which it is drawn; 0: any does."""
    return POINTS if metric.endswith("top1") else 0.0


def _drawn(sweep: SweepResults, trial: Trial, cost: str) -> bool:
    known = sweep.first in trial.metrics and cost in trial.metrics
    return known and trial.status in ("finished", "stopped")


def _full_precision(sweep: SweepResults) -> list[float]:
    """The accuracy before quantization, where all trials had the same."""
    known = [trial.metrics["fp_top1"] for trial in sweep.trials if "fp_top1" in trial.metrics]
    return known[:1] if sweep.first == "top1" and all(math.isclose(value, known[0]) for value in known) else []
