"""What became of each trial of a sweep: one line of ``trials.jsonl``, which is all that a report of the sweep reads."""

import logging
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

from qtrain.settings.run_files import TRIALS
from qtrain.sweep.domains import KnobValue
from qtrain.utils.json_lines import append_line, read_lines

log = logging.getLogger(__name__)

Status = Literal["finished", "stopped", "failed", "duplicate"]
"""``stopped``: by the scheduler, before its last epoch. ``duplicate``: its config had been run by another trial."""


COST_METRICS = ("size_bytes", "fp_size_bytes", "compression", "effective_bits", "macs", "bops")
"""Metrics of a trial that are exact costs, known before it is trained."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One trial, as it ended.

    ``id`` is the trial's name in the sweep, ``key`` the identity of its config and the name of its run's folder.
    ``overrides`` are all that its config is composed of, as one would type them to repeat it alone; ``knobs`` are what
    the search chose, by parameter.
    ``metrics`` hold ``top1`` (percent, on validation images, at the last epoch), ``best_top1``, ``size_bytes``,
    ``bops``, ``effective_bits``, ``loss`` and what else was logged. ``layer_bits`` are [weight, input] bits by layer,
    and ``ends`` the layers that read the image or give the logits. ``images`` are the numbers of images that accuracies
    rest on: ``val`` for ``top1``, ``test`` for ``test_top1``.
    ``train_s`` are seconds of training, ``overhead_s`` all others that the trial took. ``peak_bytes`` is the most
    memory that its process has taken, for this trial or one before. ``reason`` says why it was stopped or failed,
    ``of`` which trial a duplicate repeats. ``started`` and ``ended`` are Unix seconds, ``threads`` those of torch.
    """

    id: str
    key: str
    status: Status
    overrides: list[str] = field(default_factory=list)
    knobs: dict[str, KnobValue] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    layer_bits: dict[str, list[int]] = field(default_factory=dict)
    ends: list[str] = field(default_factory=list)
    images: dict[str, int] = field(default_factory=dict)
    epochs: float = 0.0
    train_s: float = 0.0
    overhead_s: float = 0.0
    peak_bytes: int = 0
    reason: str | None = None
    of: str | None = None
    started: float = 0.0
    ended: float = 0.0
    host: str = ""
    threads: int = 1

    def __post_init__(self) -> None:
        if self.status not in get_args(Status):
            raise ValueError(f"Trial: status must be one of {', '.join(get_args(Status))}, got {self.status!r}")


def append_trial(folder: Path, trial: Trial) -> None:
    """Add ``trial`` to ``folder/trials.jsonl``, in one write that has reached the disk when this returns.

    Metrics that are not finite are left out: JSON has no spelling for them.
    """
    metrics = {name: value for name, value in trial.metrics.items() if math.isfinite(value)}
    append_line(folder / TRIALS, asdict(replace(trial, metrics=metrics)), sync=True)


def read_trials(folder: Path) -> list[Trial]:
    """All trials of the sweep in ``folder``, in the order of their first lines; the last line of each counts.

    A line that a killed writer left unfinished is ignored.
    """
    trials, damaged = read_lines(folder / TRIALS, lambda row: Trial(**row))
    for number in damaged:
        log.warning("%s:%d is not a trial (an unfinished write) and is ignored", folder / TRIALS, number)
    return list({trial.id: trial for trial in trials}.values())
