"""A sweep on one page that needs nothing beside it, with its pictures and its front as files.

Everything comes from ``sweep.yaml`` and ``trials.jsonl``, and learning curves from the runs that are still there. So
the page can be made again at any time, also of a sweep that goes on or comes from another machine.
"""

import math
from collections.abc import Collection, Sequence
from pathlib import Path

from qtrain.report.chart import spec, write_png
from qtrain.report.difference import CLAIMED, Accuracy, difference
from qtrain.report.formatting import (
    bits_text,
    knob_label,
    knob_text,
    knobs_text,
    mean_bits,
    metric_label,
    metric_said,
    metric_text,
)
from qtrain.report.html import Cell, number, render, word
from qtrain.report.pareto_export import PARETO, AsExperiment, front_points, write_front
from qtrain.report.sweep_plots import Plot, plots
from qtrain.sweep.domains import KnobValue, is_number
from qtrain.sweep.sweep_results import SweepResults, read_sweep
from qtrain.sweep.trial import Trial
from qtrain.utils.atomic_write import write_text
from qtrain.utils.progress import duration

PAGE = "sweep.html"

ALSO = ("test_top1", "size_bytes", "bops", "effective_bits")
"""Metrics that tables show beside the objectives, where a trial has them."""


def write_sweep_report(folder: Path, *, as_experiment: AsExperiment) -> Path:
    """``sweep.html``, its pictures, ``pareto.csv`` and ``front/`` in the sweep's ``folder``; returns the page's path.

    ``as_experiment`` makes an experiment file of a trial's overrides.

    Raises ``FileNotFoundError`` where there is no sweep.
    """
    sweep = read_sweep(folder)
    made = front_points(sweep, as_experiment)
    write_front(sweep, made)
    metrics = metrics_of(sweep)
    columns, front_rows = front_table(sweep, metrics)
    trial_columns, trial_rows = trial_table(sweep, metrics)
    pictures, charts = _draw(sweep)
    page = render(
        "sweep.html.j2",
        title=sweep.name,
        counted=sweep.spending.counted(),
        rests=rests_on(sweep),
        tiles=tiles(sweep),
        deciding=[plot for plot in pictures if plot.decides],
        explaining=[plot for plot in pictures if not plot.decides],
        charts=charts,
        front_columns=columns,
        front=list(zip(sweep.front, front_rows, made, strict=True)),
        trial_columns=trial_columns,
        trials=list(zip(sweep.trials, trial_rows, strict=True)),
        statuses=[status for status, count in sweep.spending.counts.items() if count],
        numbers=sweep.numbers,
        points=sweep.points,
        tips={sweep.numbers[trial.id]: tip(sweep, trial) for trial in sweep.trials},
        pareto=PARETO,
    )
    write_text(folder / PAGE, page)
    return folder / PAGE


def metrics_of(sweep: SweepResults) -> list[str]:
    """What tables show of each trial: the objectives, then costs and test accuracy where they are known."""
    known = {name for trial in sweep.trials for name in trial.metrics}
    return [name for name in dict.fromkeys([*sweep.objectives, *ALSO]) if name in known]


def rests_on(sweep: SweepResults) -> str:
    """How many images and seeds the accuracies rest on, and which difference says nothing; empty where all is unknown.

    The difference is two standard errors of that between two models as good as the best, on the validation images.
    """
    said = []
    images = {split: {t.images[split] for t in sweep.trials if t.images.get(split)} for split in ("val", "test")}
    if images["val"]:
        said.append(f"val top-1 is of {_either(images['val'])} images that no trial trained on")
    if images["test"] and any("test_top1" in trial.metrics for trial in sweep.trials):
        said.append(f"test top-1 of {_either(images['test'])} test images")
    seeds = {trial.knobs.get("seed", sweep.config.get("seed")) for trial in sweep.trials} - {None}
    if said and seeds:
        said.append(f"each model was trained once, with seed {_either(seeds)}")
    best = max((trial.metrics["top1"] for trial in sweep.trials if "top1" in trial.metrics), default=None)
    text = "; ".join(said)
    if images["val"] and best is not None:
        of_best = {0: Accuracy(best)}
        error = difference(of_best, of_best, images=min(images["val"])).error
        text += f". Near the best, differences below {CLAIMED * error:.2f} points are less than two standard errors"
    return text[:1].upper() + text[1:] + ("." if text else "")


def _either(values: Collection[object]) -> str:
    """``1,000`` or ``360 or 1,000``."""
    return " or ".join(sorted(f"{value:,}" if isinstance(value, int) else str(value) for value in values))


def tiles(sweep: SweepResults) -> list[tuple[str, str, str]]:
    """What the sweep came to at a glance: (name, metric, what it says of it)."""
    spent, best = sweep.spending, sweep.front[:1]
    found: list[tuple[str, str, str]] = []
    for trial in best:
        costs = ", ".join(metric_said(n, trial.metrics[n]) for n in ("size_bytes", "bops") if n in trial.metrics)
        found.append((f"best {metric_label(sweep.first)}", metric_text(sweep.first, trial.metrics[sweep.first]), costs))
    found.append(("on the front", str(len(sweep.front)), f"of {spent.counts['finished']} trained to their end"))
    found.append(("epochs spent", f"{spent.epochs:g}", f"{spent.share:.0%} of full training of all trials"))
    if spent.overhead_median_s is not None:
        found.append(("overhead of a trial", f"{spent.overhead_median_s:.2g} s", "median, beyond its training"))
    if spent.peak_bytes:
        found.append(("memory of a worker", f"{spent.peak_bytes / 1e9:.2g} GB", "at most"))
    found.append(("time", duration(spent.wall_s), "in which trials ran"))
    return found


def front_table(sweep: SweepResults, metrics: Sequence[str]) -> tuple[list[str], list[list[Cell]]]:
    """Columns and rows of the front: place, trial, metrics, bits, knobs."""
    columns = ["Point", "Trial", *map(metric_label, metrics), "Bits", *_knob_columns(sweep)]
    rows = [
        [
            number(sweep.points[trial.id], "{:.0f}".format),
            number(sweep.numbers[trial.id], "{:.0f}".format),
            *(_metric(trial, name) for name in metrics),
            _bits(trial),
            *_knobs(sweep, trial),
        ]
        for trial in sweep.front
    ]
    return columns, rows


def trial_table(sweep: SweepResults, metrics: Sequence[str]) -> tuple[list[str], list[list[Cell]]]:
    """Columns and rows of all trials, in the order in which they were begun."""
    columns = [
        "Trial", "Status", "Point", *map(metric_label, metrics), "Bits", *_knob_columns(sweep), "Epochs", "Training",
        "Overhead", "Reason",
    ]  # fmt: skip
    rows = [
        [
            number(sweep.numbers[trial.id], "{:.0f}".format),
            word(trial.status),
            number(sweep.points.get(trial.id), "{:.0f}".format),
            *(_metric(trial, name) for name in metrics),
            _bits(trial),
            *_knobs(sweep, trial),
            number(trial.epochs, "{:g}".format),
            number(trial.train_s, duration),
            number(trial.overhead_s, "{:.2f} s".format),
            word(_reason(sweep, trial)),
        ]
        for trial in sweep.trials
    ]
    return columns, rows


def tip(sweep: SweepResults, trial: Trial) -> str:
    """What a picture says of a trial under the pointer."""
    place = f"point {sweep.points[trial.id]} of the front" if trial.id in sweep.points else trial.status
    told = [metric_said(name, trial.metrics[name]) for name in metrics_of(sweep) if name in trial.metrics]
    lines = [f"Trial {sweep.numbers[trial.id]}, {place}", ", ".join(told), bits_text(trial)]
    return "\n".join(line for line in [*lines, knobs_text(trial.knobs, sweep.space)] if line)


def _draw(sweep: SweepResults) -> tuple[list[Plot], dict[str, dict[str, object]]]:
    """Each picture as a PNG beside the page; returns those with something to see, and their charts by name."""
    shown, charts = [], {}
    for plot in plots(sweep):
        chart = plot.draw(sweep)
        path = sweep.folder / f"{plot.name}.png"
        if chart is None:
            path.unlink(missing_ok=True)  # of an earlier report
            continue
        write_png(chart, path)
        shown.append(plot)
        charts[plot.name] = spec(chart)
    return shown, charts


def _knob_columns(sweep: SweepResults) -> list[str]:
    return [knob_label(name, sweep.knobs) for name in sweep.knobs]


def _knobs(sweep: SweepResults, trial: Trial) -> list[Cell]:
    chosen = sweep.chosen(trial)
    return [_knob(chosen[name]) if name in chosen else word(None) for name in sweep.knobs]


def _knob(value: KnobValue) -> Cell:
    return Cell(knob_text(value), float(value) if is_number(value) else knob_text(value))


def _metric(trial: Trial, name: str) -> Cell:
    return number(trial.metrics.get(name), lambda value: metric_text(name, value))


def _bits(trial: Trial) -> Cell:
    """Sorted by the product of the mean bits, which is what arithmetic costs."""
    means = mean_bits(trial)
    return Cell(bits_text(trial), -math.inf if means is None else means[0] * means[1])


def _reason(sweep: SweepResults, trial: Trial) -> str | None:
    if trial.status == "duplicate" and trial.of in sweep.numbers:
        return f"the same config as trial {sweep.numbers[trial.of]}"
    return trial.reason
