"""How to get a model of the front again: one command, the same as a YAML file, and all of it as a table.

A trial is an ordinary run, so its own overrides are the command. As YAML they become an experiment of their own,
``front/p3.yaml``: choices of groups in its defaults list, values below them. The name begins with a letter, because
Hydra takes a number for no file's name.
"""

import csv
import io
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from qtrain.report.formatting import bits_text, mean_bits, metric_said
from qtrain.sweep.sweep_results import SweepResults
from qtrain.sweep.trial import Trial
from qtrain.utils.atomic_write import write_text

FRONT, PARETO = "front", "pareto.csv"
OUTPUT = "outputs"
"""Where runs go unless a command says otherwise."""
PLAIN = re.compile(r"[\w.:/@-]+")

AsExperiment = Callable[[Sequence[str]], tuple[dict[str, Any], list[str]]]
"""From overrides to the content of an experiment file, and those of them that no file can say."""


@dataclass(frozen=True)
class FrontPoint:
    """A point of the front: the command that runs it, the YAML that says the same, and the command that runs that."""

    trial: Trial
    place: int
    command: str
    file: str
    content: str


def front_points(sweep: SweepResults, as_experiment: AsExperiment) -> list[FrontPoint]:
    """One for each model of the front, in its order."""
    return [_front_point(sweep, trial, place, as_experiment) for place, trial in enumerate(sweep.front, start=1)]


def write_front(sweep: SweepResults, made: Sequence[FrontPoint]) -> None:
    """``front/p1.yaml`` and so on, without those of an earlier front, and ``pareto.csv``."""
    folder = sweep.folder / FRONT
    for point in made:
        write_text(sweep.folder / point.file, point.content)
    current = {point.file for point in made}
    for stale in folder.glob("p*.yaml"):
        if f"{FRONT}/{stale.name}" not in current:
            stale.unlink()
    write_text(sweep.folder / PARETO, pareto_csv(sweep, made))


def command(trial: Trial, overrides: Sequence[str] | None = None, *, output: str | None = None) -> str:
    """What to type for the run of ``trial`` alone, or for ``overrides`` that lead to the same run.

    On a CPU sums depend in their last digits on the number of threads, so the command sets those that the trial had.
    ``output`` is the folder of runs, where it is not the default.
    """
    words = ["python", "-m", "qtrain", *(trial.overrides if overrides is None else overrides), f"name={trial.key}"]
    if output is not None:
        words.append(f"output={output}" if PLAIN.fullmatch(output) else f"output='{output}'")  # Hydra's quotes
    return f"OMP_NUM_THREADS={trial.threads} {shlex.join(words)}"


def pareto_csv(sweep: SweepResults, made: Sequence[FrontPoint]) -> str:
    """The front as a table: place, trial, every metric, mean bits of weights and inputs, knobs, the command."""
    metrics = list(dict.fromkeys([*sweep.objectives, *(name for point in made for name in point.trial.metrics)]))
    knobs = list(dict.fromkeys(name for point in made for name in point.trial.knobs))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["point", "trial", "key", *metrics, "w_bits_mean", "a_bits_mean", "epochs", *knobs, "command"])
    for point in made:
        trial = point.trial
        means = mean_bits(trial)
        writer.writerow([
            point.place, trial.id, trial.key, *(trial.metrics.get(name, "") for name in metrics),
            *(("", "") if means is None else (f"{mean:.4g}" for mean in means)), f"{trial.epochs:g}",
            *(trial.knobs.get(name, "") for name in knobs), point.command,
        ])  # fmt: skip
    return text.getvalue()


def _front_point(sweep: SweepResults, trial: Trial, place: int, as_experiment: AsExperiment) -> FrontPoint:
    content, left = as_experiment(trial.overrides)
    name, output = f"p{place}", sweep.config.get("output")
    output = None if output == OUTPUT else output
    place_of_file = f"file://{sweep.folder.resolve()}"
    if not PLAIN.fullmatch(place_of_file):
        place_of_file = f"'{place_of_file}'"  # Hydra's quotes
    short = command(trial, [f"hydra.searchpath=[{place_of_file}]", f"+{FRONT}={name}", *left], output=output)
    metrics = ", ".join(metric_said(metric, trial.metrics[metric]) for metric in sweep.objectives)
    head = [
        "# @package _global_",
        f"# Point {place} of the front of {sweep.name}: {metrics}, {bits_text(trial)} (trial {trial.id}).",
        f"# {short}",
        "# Test images are left alone, as in the sweep; fit.final_test=true evaluates them once, after training.",
    ]
    text = "\n".join(head) + "\n" + yaml.safe_dump(content, sort_keys=False, width=120, default_flow_style=None)
    return FrontPoint(trial, place, command(trial, output=output), f"{FRONT}/{name}.yaml", text)
