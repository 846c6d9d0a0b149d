"""The file ``metrics.jsonl``, which loses no row.

W&B keeps its last rows in memory, so a killed run lacks them there. ``metrics.jsonl`` has all rows, and reports read
only this file.
"""

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
    1970, train or val or test. Numbers that are not finite become ``null``, since JSON cannot express them.

    A checkpoint stores the length of the file by ``position()``, and a resumed run cuts it there by
    ``rewind(position)``. Otherwise rows that a killed run wrote after its last save would be there twice.
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
        """Does nothing: the configuration has its own file next to the metrics."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write one row for each split that occurs in ``metrics``; each has the ``epoch`` of ``metrics``."""
        metrics = dict(metrics)
        head = {"step": int(step or 0), "epoch": int(metrics.pop("epoch", 0)), "time": round(time.time(), 3)}
        file = self._open()
        for split, values in split_metrics(metrics).items():
            numbers = {name: float(value) if math.isfinite(value) else None for name, value in values.items()}
            file.write(json.dumps({**head, "split": split, **numbers}).encode() + b"\n")
        file.flush()

    def position(self) -> int:
        """Length of the file in bytes; all of them are on the disk when this returns."""
        file = self._open()
        file.flush()
        os.fsync(file.fileno())
        return self.path.stat().st_size

    def rewind(self, position: int) -> None:
        """Remove everything after ``position``, including an unfinished line of a killed run."""
        file = self._open()
        size = self.path.stat().st_size
        if size < position:
            log.warning("%s has %d bytes, but the resume point says %d: rows are missing", self.path, size, position)
            position = size
        content = self.path.read_bytes()[:position]
        # If the file was damaged, the cut may lie within a line: keep only whole lines.
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
    """Close files and finish the W&B run; ``error`` is the exception with which the run ended, if any."""
    for logger in loggers:
        if logger is not None:
            logger.finalize(_status(error))


def _status(error: BaseException | None) -> str:
    if error is None:
        return "success"
    if isinstance(error, RunInterruptedError):
        return "interrupted"
    return "stopped" if isinstance(error, SystemExit) else "failed"  # a sweep's scheduler ends a trial by SystemExit
