"""What became of each trial of a sweep: one line of ``trials.jsonl``, which is all that a report of the sweep reads."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

log = logging.getLogger(__name__)

TRIALS = "trials.jsonl"

Status = Literal["finished", "stopped", "failed", "duplicate"]
"""``stopped``: by the scheduler, before its last epoch. ``duplicate``: its config had been run by another trial."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One trial, as it ended.

    ``id`` is the trial's name in the sweep, ``key`` the identity of its config and the name of its run's folder.
    ``overrides`` are all that its config is composed of, as one would type them to repeat it alone; ``knobs`` are what
    the search chose, by parameter.
    ``metrics`` hold ``top1`` (percent, on validation images, at the last epoch), ``best_top1``, ``size_bytes``,
    ``bops``, ``effective_bits``, ``loss`` and what else was logged. ``layer_bits`` are [weight, input] bits by layer.
    ``train_s`` are seconds of training, ``overhead_s`` all others that the trial took. ``reason`` says why it was
    stopped or failed, ``of`` which trial a duplicate repeats. ``started`` and ``ended`` are Unix seconds, ``threads``
    those of torch.
    """

    id: str
    key: str
    status: Status
    overrides: list[str] = field(default_factory=list)
    knobs: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    layer_bits: dict[str, list[int]] = field(default_factory=dict)
    epochs: float = 0.0
    train_s: float = 0.0
    overhead_s: float = 0.0
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

    Figures that are not finite are left out: JSON has no spelling for them.
    """
    plain = asdict(trial)
    plain["metrics"] = {name: value for name, value in trial.metrics.items() if math.isfinite(value)}
    line = json.dumps(plain, allow_nan=False).encode() + b"\n"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / TRIALS).open("a+b", buffering=0) as file:
        if file.seek(0, os.SEEK_END) and not _ends_a_line(file):
            line = b"\n" + line  # what a killed writer left must not spoil this line as well
        file.write(line)
        os.fsync(file.fileno())


def read_trials(folder: Path) -> list[Trial]:
    """All trials of the sweep in ``folder``, in the order of their first lines; the last line of each counts.

    A line that a killed writer left unfinished is ignored.
    """
    return list({trial.id: trial for trial in _lines(folder / TRIALS)}.values())


def _lines(path: Path) -> Iterator[Trial]:
    if not path.is_file():
        return
    known = {field.name for field in fields(Trial)}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            plain = json.loads(line)
            yield Trial(**{name: value for name, value in plain.items() if name in known})
        except (ValueError, TypeError, AttributeError):
            log.warning("%s:%d is not a trial (an unfinished write) and is ignored", path, number)


def _ends_a_line(file: Any) -> bool:
    file.seek(-1, os.SEEK_END)
    return bool(file.read(1) == b"\n")
