"""A sweep while it goes on: what runs, the front so far, what is spent and what is left.

At a terminal a table that stays in its place; elsewhere a line for each trial that ended and, now and then, one of the
whole sweep.
"""

import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self, TextIO, final

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from qtrain.report.formatting import bits_text, knobs_text, metric_label, metric_said, metric_text
from qtrain.sweep.pareto import Objectives, front
from qtrain.sweep.running import Running
from qtrain.sweep.spending import Spending, spending
from qtrain.sweep.trial import Trial
from qtrain.utils.progress import duration

MOST_RUNNING, MOST_FRONT = 8, 12
"""Rows of the two tables at a terminal; what is left out is counted."""


@final
class LiveTable:
    """Shows a sweep of ``trials`` trials (``None``: no such limit) under ``title``, and what ``update`` is told of it.

    ``epochs`` are those of a full training, ``space`` names the knobs. ``spent_s`` is how much of ``time_budget_s`` an
    earlier command had spent. ``file`` is stderr where not given, ``every_s`` the time between two lines of the whole
    sweep where that is no terminal, ``clock`` tells Unix seconds. Use it in a ``with`` block, or call ``close``.
    """

    def __init__(
        self,
        *,
        title: str,
        objectives: Objectives,
        epochs: float,
        space: Iterable[str] = (),
        trials: int | None = None,
        time_budget_s: float | None = None,
        spent_s: float = 0.0,
        file: TextIO | None = None,
        every_s: float = 30.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if every_s <= 0:
            raise ValueError(f"LiveTable: every_s must be positive, got {every_s}")
        self.title, self.objectives, self.epochs = title, objectives, epochs
        self.space = tuple(space)
        self.trials, self.time_budget_s, self.spent_s = trials, time_budget_s, spent_s
        self.file, self.every_s, self.clock = file or sys.stderr, every_s, clock
        self._began = clock()
        self._said = -math.inf
        self._known: set[str] | None = None
        self._before = 0
        self._live: Live | None = None
        console = Console(file=self.file)
        if console.is_terminal and not console.is_dumb_terminal:
            # What others print then goes above the table; but not what they print into a pipe.
            shared = sys.stdout.isatty()
            self._live = Live(console=console, auto_refresh=False, transient=True, redirect_stdout=shared)
            self._live.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Take the table away; lines stay."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def update(self, trials: Sequence[Trial], running: Iterable[Running] = ()) -> None:
        """Show the ended ``trials``, those of earlier commands included, and the ``running`` ones.

        What the first call tells of is taken as known, and only counted.
        """
        now, going = self.clock(), list(running)
        if self._known is None:
            self._known, self._before = {trial.id for trial in trials}, len(trials)
        if self._live is not None:
            self._live.update(self._picture(trials, going, now), refresh=True)
        else:
            self._lines(trials, going, now)

    def _lines(self, trials: Sequence[Trial], running: list[Running], now: float) -> None:
        assert self._known is not None
        best = {trial.id for trial in front(trials, self.objectives)}
        for number, trial in enumerate(trials, start=1):
            if trial.id not in self._known:
                self._known.add(trial.id)
                place = f"trial {number}" + ("" if self.trials is None else f" of {self.trials}")
                knobs = knobs_text(trial.knobs, self.space)
                told = ended_line(trial, self.objectives, on_front=trial.id in best)
                self.file.write(f"{place} {told}" + (f"; {knobs}" if knobs else "") + "\n")
        if now - self._said >= self.every_s:
            self._said = now
            self.file.write(f"{self.title}: {self._status(trials, running, now)}; on the front {len(best)}\n")
        self.file.flush()

    def _status(self, trials: Sequence[Trial], running: Sequence[Running], now: float) -> str:
        spent = spending(trials, self.epochs)
        parts = [_counted(spent, self.trials)]
        if running:
            parts.append(f"{len(running)} running")
        elapsed = self.spent_s + now - self._began
        parts.append(duration(elapsed) + (f" of {duration(self.time_budget_s)}" if self.time_budget_s else ""))
        if (left := self._left_s(len(trials), elapsed, now)) is not None:
            parts.append(f"about {duration(left)} left")
        if trials:
            parts.append(
                f"{spent.epochs:g} epochs spent, full training of all {spent.full_epochs:g} ({spent.share:.0%})"
            )
        return ", ".join(parts)

    def _left_s(self, ended: int, elapsed: float, now: float) -> float | None:
        """Seconds until trials or time run out at the pace since this command began; ``None`` before there is one."""
        limits = [] if self.time_budget_s is None else [self.time_budget_s - elapsed]
        new = ended - self._before
        if self.trials is not None and new > 0:
            limits.append((now - self._began) / new * max(0, self.trials - ended))
        return max(0.0, min(limits)) if limits else None

    def _picture(self, trials: Sequence[Trial], running: list[Running], now: float) -> Group:
        best = front(trials, self.objectives)
        numbers = {trial.id: str(number) for number, trial in enumerate(trials, start=1)}
        parts: list[Any] = [Text.assemble((self.title, "bold"), "  ", self._status(trials, running, now))]
        if running:
            parts.append(self._running_table(running, now))
        if best:
            parts.append(_front_table(best, self.objectives, numbers, self.space))
        return Group(*parts)

    def _running_table(self, running: list[Running], now: float) -> Table:
        first = next(iter(self.objectives))
        table = _table("Running", len(running), MOST_RUNNING)
        for column in ("Epoch", metric_label(first), "Time"):
            table.add_column(column, justify="right")
        table.add_column("Knobs", overflow="ellipsis", no_wrap=True)
        for run in running[:MOST_RUNNING]:
            of = "" if run.epochs is None else f"/{run.epochs:g}"
            value = metric_text(first, run.metrics[first]) if first in run.metrics else ""
            taken = duration(now - run.started) if run.started else "waits"
            table.add_row(f"{run.epoch:g}{of}", value, taken, knobs_text(run.knobs, self.space))
        return table


def ended_line(trial: Trial, objectives: Objectives, *, on_front: bool) -> str:
    """``finished: 8 epochs, val top-1 90.12 %, size 68.5 kB, W4A4, on the front``, and the reason if there is one."""
    if trial.status == "duplicate":
        return f"duplicate: of {trial.of}"
    parts = [f"{trial.epochs:g} epochs"]
    parts += [metric_said(name, trial.metrics[name]) for name in objectives if name in trial.metrics]
    parts += [text for text in (bits_text(trial), "on the front" if on_front else "", trial.reason) if text]
    return f"{trial.status}: {', '.join(parts)}"


def print_front(
    trials: Sequence[Trial], objectives: Objectives, *, space: Iterable[str] = (), file: TextIO | None = None
) -> None:
    """The front as a table, to standard output: framed at a terminal, plain columns elsewhere."""
    file = file or sys.stdout
    numbers = {trial.id: str(number) for number, trial in enumerate(trials, start=1)}
    best = front(trials, objectives)
    console = Console(file=file)
    if not best:
        console.print("front: no trial has finished")
        return
    table = _front_table(best, objectives, numbers, tuple(space), most=len(best))
    if not file.isatty():
        table.box = None
    # rich would cut cells where the terminal is too narrow; lines that the terminal wraps show everything.
    console.width = max(console.width, console.measure(table, options=console.options.update(max_width=1000)).maximum)
    console.print(table)


def _front_table(
    best: Sequence[Trial],
    objectives: Objectives,
    numbers: Mapping[str, str],
    space: Iterable[str],
    most: int = MOST_FRONT,
) -> Table:
    """``best`` as rows, the first objective's best first; ``numbers`` are the trials', by id."""
    table = _table("Front", len(best), most)
    for column in ("Trial", *map(metric_label, objectives)):
        table.add_column(column, justify="right")
    table.add_column("Bits")
    table.add_column("Knobs", overflow="ellipsis", no_wrap=True)
    for trial in best[:most]:
        metrics = [metric_text(name, trial.metrics[name]) for name in objectives]
        table.add_row(numbers[trial.id], *metrics, bits_text(trial), knobs_text(trial.knobs, space))
    return table


def _table(title: str, rows: int, most: int) -> Table:
    left_out = f", {most} of {rows}" if rows > most else ""
    return Table(
        title=title + left_out, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )


def _counted(spent: Spending, trials: int | None) -> str:
    """``23 of 64 trials (1 failed, 3 duplicates)``: what is not simply finished in brackets."""
    total = "" if trials is None else f" of {trials}"
    others = [part for part in spent.counted().partition(": ")[2].split(", ") if part and "finished" not in part]
    return f"{spent.ended}{total} trials" + (f" ({', '.join(others)})" if others else "")
