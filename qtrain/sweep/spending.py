"""What a sweep has spent, and what it would have cost to train every trial to its end."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from typing import get_args

from qtrain.sweep.trial import Status, Trial

EPOCHS_KEY = "fit.epochs"


@dataclass(frozen=True)
class Spending:
    """``counts`` of trials by status; ``epochs`` trained, and ``full_epochs`` had each been trained to its end.

    A duplicate cost nothing and would have cost its full training. ``train_s`` and ``overhead_s`` are seconds over all
    trials; ``overhead_median_s`` is the median of those that finished, which alone tell; ``wall_s`` are
    seconds in which some trial ran, so interruptions do not count. ``peak_bytes`` is the most that a worker took.
    """

    counts: dict[Status, int]
    epochs: float
    full_epochs: float
    train_s: float
    overhead_s: float
    overhead_median_s: float | None
    wall_s: float
    peak_bytes: int

    @property
    def ended(self) -> int:
        return sum(self.counts.values())

    @property
    def share(self) -> float:
        """Epochs spent over those of full training of all; 0 before the first trial."""
        return self.epochs / self.full_epochs if self.full_epochs else 0.0

    def counted(self) -> str:
        """``23 trials: 12 finished, 8 stopped, 2 failed, 1 duplicate``."""
        parts = [f"{count} {_plural(status, count)}" for status, count in self.counts.items() if count]
        return f"{self.ended} {_plural('trial', self.ended)}" + (f": {', '.join(parts)}" if parts else "")


def spending(trials: Iterable[Trial], epochs: float) -> Spending:
    """What ``trials`` cost; ``epochs`` are those of one that is not stopped and whose own overrides do not say."""
    known = list(trials)
    ran = [trial for trial in known if trial.status != "duplicate"]
    overheads = [trial.overhead_s for trial in ran if trial.status == "finished"]
    return Spending(
        counts={status: sum(trial.status == status for trial in known) for status in get_args(Status)},
        epochs=sum(trial.epochs for trial in ran),
        full_epochs=sum(full_epochs(trial, epochs) for trial in known),
        train_s=sum(trial.train_s for trial in ran),
        overhead_s=sum(trial.overhead_s for trial in ran),
        overhead_median_s=median(overheads) if overheads else None,
        wall_s=_covered((trial.started, trial.ended) for trial in ran if trial.started),
        peak_bytes=max((trial.peak_bytes for trial in ran), default=0),
    )


def _covered(intervals: Iterable[tuple[float, float]]) -> float:
    """The length of the union of ``intervals`` (start, end).

    >>> _covered([(0.0, 4.0), (2.0, 5.0), (100.0, 101.0)])
    6.0
    """
    covered, reached = 0.0, -math.inf
    for start, end in sorted(intervals):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered


def full_epochs(trial: Trial, epochs: float) -> float:
    """Epochs of ``trial`` if it is trained to its end: its own ``fit.epochs`` where the search chose it."""
    own = [
        override.partition("=")[2] for override in trial.overrides if override.lstrip("+").startswith(f"{EPOCHS_KEY}=")
    ]
    return float(own[-1]) if own else epochs


def _plural(word: str, count: int) -> str:
    return word + "s" if word in ("trial", "duplicate") and count != 1 else word
