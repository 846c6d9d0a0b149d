"""Where metrics go: a file of ours that loses no row.

W&B, where it is wanted, keeps its last rows in memory, so a killed run lacks them; ``metrics.jsonl`` is the
record, and reports read only that.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, final

from pytorch_lightning.loggers import Logger

from qtrain.utils.errors import RunInterruptedError

log = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")
WALL_CLOCK_FIELDS = ("time", "images_per_s")
"""Fields of a row that differ between two otherwise identical runs."""


def split_metrics(metrics: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """``{"val/top1": 90.0}`` to ``{"val": {"top1": 90.0}}``; names without a known split count as train."""
    rows: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        split, _, rest = name.partition("/")
        split, rest = (split, rest) if split in SPLITS and rest else ("train", name)
        rows.setdefault(split, {})[rest] = value
    return rows


@final
class JsonlLogger(Logger):
    """Appends rows to ``folder/metrics.jsonl``, each flushed at once.

    A row is ``{"step", "epoch", "time", "split", name: number, ...}``: optimizer steps done, epoch, seconds since
    1970, train or val or test. Numbers that are not finite become ``null``, as JSON has no others.

    ``position()`` and ``rewind(position)`` let a checkpoint remember how long the file was: rows that a killed run
    wrote after its last save are written again by the run that resumes, and must not be there twice.
    """

    def __init__(self, *, folder: str | Path) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.jsonl"
        self._file: IO[bytes] | None = None

    @property
    def name(self) -> str:
        return "jsonl"

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: the configuration lies beside the metrics, in a file of its own."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """One row for each split that occurs in ``metrics``; its ``epoch`` goes to every row."""
        metrics = dict(metrics)
        head = {"step": int(step or 0), "epoch": int(metrics.pop("epoch", 0)), "time": round(time.time(), 3)}
        file = self._open()
        for split, values in split_metrics(metrics).items():
            numbers = {name: float(value) if math.isfinite(value) else None for name, value in values.items()}
            file.write(json.dumps({**head, "split": split, **numbers}).encode() + b"\n")
        file.flush()

    def position(self) -> int:
        """Length of the file in bytes, all of which are on the disk when this returns."""
        file = self._open()
        file.flush()
        os.fsync(file.fileno())
        return self.path.stat().st_size

    def rewind(self, position: int) -> None:
        """Drop what was written after ``position``, half a line of a killed run included."""
        file = self._open()
        size = self.path.stat().st_size
        if size < position:
            log.warning("%s has %d bytes where the resume point knows %d: rows are missing", self.path, size, position)
            position = size
        content = self.path.read_bytes()[:position]
        # After damage from outside the cut may lie within a line: keep whole lines only.
        file.truncate(content.rfind(b"\n") + 1)
        file.flush()
        os.fsync(file.fileno())

    def finalize(self, status: str) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> IO[bytes]:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab")
        return self._file


def close(loggers: Sequence[Logger | None], *, error: BaseException | None = None) -> None:
    """End the loggers: files closed, the W&B run finished. ``error`` is what the run ended with."""
    for logger in loggers:
        if logger is not None:
            logger.finalize(_status(error))


def _status(error: BaseException | None) -> str:
    if error is None:
        return "success"
    if isinstance(error, RunInterruptedError):
        return "interrupted"
    return "stopped" if isinstance(error, SystemExit) else "failed"  # a sweep's scheduler ends a trial by SystemExit
