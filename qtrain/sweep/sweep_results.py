"""A sweep as its folder tells it: config, trials, front. What pictures and the page are made of."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from qtrain.settings.run_files import METRICS, TRIALS
from qtrain.sweep.domains import KnobValue, KnobValues
from qtrain.sweep.importance import knob_importance
from qtrain.sweep.pareto import Direction, Objectives, front
from qtrain.sweep.spending import Spending, spending
from qtrain.sweep.trial import Trial, read_trials
from qtrain.utils.json_lines import read_metrics

SWEEP = "sweep.yaml"
"""The sweep's resolved config; under ``overrides`` those that led to it."""

RUNS = "trials"
"""Folder of the trials' runs, each named by its key."""

TEST = "test_top1"
"""Metric of a trial of the front or of the start: accuracy on the test images, in percent. The search never sees it."""


@dataclass(frozen=True)
class SweepResults:
    """``trials`` in the order in which they were begun; ``config`` is empty where ``sweep.yaml`` is missing."""

    folder: Path
    config: Mapping[str, Any]
    trials: list[Trial]
    objectives: Objectives

    @property
    def name(self) -> str:
        return str(self.config.get("experiment") or self.folder.resolve().name)

    @property
    def overrides(self) -> list[str]:
        """The sweep's own, as they were typed; what it was an experiment of, at least."""
        experiment = self.config.get("experiment")
        known = self.config.get("overrides")
        return list(known) if known is not None else [f"+experiment={experiment}"] if experiment else []

    @property
    def first(self) -> str:
        """The metric that is wanted first of all."""
        return next(iter(self.objectives))

    @property
    def space(self) -> list[str]:
        """Names of the knobs, as the config has them."""
        return list((self.config.get("sweep") or {}).get("space") or {})

    @property
    def knobs(self) -> list[str]:
        """Names of the knobs that trials have, in the order of the space, then what else they had."""
        names = [name for trial in self.trials for name in self.chosen(trial)]
        return list(dict.fromkeys([*(name for name in self.space if name in names), *names]))

    def chosen(self, trial: Trial) -> dict[str, KnobValue]:
        """What the search chose for ``trial`` by knob; of a knob of several parameters their list."""
        return grouped(trial.knobs, self.space)

    @property
    def epochs(self) -> float:
        """Those of a full training."""
        return float((self.config.get("fit") or {}).get("epochs") or max((t.epochs for t in self.trials), default=0.0))

    @cached_property
    def front(self) -> list[Trial]:
        return front(self.trials, self.objectives)

    @cached_property
    def points(self) -> dict[str, int]:
        """Trial -> its place on the front, from 1."""
        return {trial.id: place for place, trial in enumerate(self.front, start=1)}

    @cached_property
    def numbers(self) -> dict[str, int]:
        """Trial -> its number among all, from 1."""
        return {trial.id: number for number, trial in enumerate(self.trials, start=1)}

    @cached_property
    def spending(self) -> Spending:
        return spending(self.trials, self.epochs)

    @property
    def totals(self) -> dict[str, float]:
        """How many trials ended how, the length of the front, and the front's best value of each objective."""
        found: dict[str, float] = {str(status): count for status, count in self.spending.counts.items()}
        found["front"] = len(self.front)
        for name, way in self.objectives.items():
            if values := [trial.metrics[name] for trial in self.front]:
                found[f"best/{name}"] = max(values) if way == "max" else min(values)
        return found

    def direction(self, metric: str) -> Direction:
        """Whether more of ``metric`` is better; what is no objective is a cost, unless it is an accuracy."""
        return self.objectives.get(metric, "max" if metric.endswith("top1") else "min")

    def importance(self, objective: str) -> dict[str, float]:
        """How much each parameter explains of ``objective``, of 1; empty where trials do not tell."""
        return knob_importance(self.trials, objective)

    def curve(self, trial: Trial) -> list[tuple[float, float]]:
        """(epochs trained, first objective) after each epoch, of a trial whose run is still in its folder."""
        name = self.first.removeprefix("val/").removeprefix("best_")
        rows, _ = read_metrics(self.folder / RUNS / trial.key / METRICS)
        found = {}
        for row in rows:
            value, epoch = row.get(name), row.get("epoch")
            if row.get("split") == "val" and isinstance(value, int | float) and isinstance(epoch, int | float):
                found[float(epoch) + 1] = float(value)
        return sorted(found.items())


def is_sweep(folder: Path) -> bool:
    return (folder / TRIALS).is_file() or (folder / SWEEP).is_file()


def read_sweep(folder: Path) -> SweepResults:
    """The sweep in ``folder``. Raises ``FileNotFoundError`` without one, ``ValueError`` where its config is damaged."""
    if not is_sweep(folder):
        raise FileNotFoundError(f"report.folder: there is no sweep in {folder}: neither {SWEEP} nor {TRIALS}")
    config: Any = {}
    if (folder / SWEEP).is_file():
        try:
            config = yaml.safe_load((folder / SWEEP).read_text(encoding="utf-8")) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{folder / SWEEP} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{folder / SWEEP} holds a {type(config).__name__}, not the config of a sweep")
    asked = (config.get("sweep") or {}).get("objectives") or {"top1": "max", "size_bytes": "min"}
    objectives = {str(name): direction for name, direction in asked.items() if direction is not None}
    return SweepResults(folder, config, read_trials(folder), objectives)


def grouped(knobs: KnobValues, space: Iterable[str]) -> dict[str, KnobValue]:
    """``knobs``, parameters as the search knows them, by the names in ``space``: bits of blocks become one list.

    >>> grouped({"widths.layer1.0": 4, "widths.layer1.1": 3, "optimizer.lr": 0.1}, ["widths", "optimizer.lr"])
    {'widths': [4, 3], 'optimizer.lr': 0.1}
    """
    names = sorted(space, key=len, reverse=True)
    together: dict[str, KnobValue] = {}
    lists: dict[str, list[KnobValue]] = {}
    for parameter, value in knobs.items():
        name = next((name for name in names if parameter.startswith(f"{name}.")), None)
        if name is None or parameter in names:
            together[parameter] = value
        else:
            together[name] = lists.setdefault(name, [])
            lists[name].append(value)
    return together
