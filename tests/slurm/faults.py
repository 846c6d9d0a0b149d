"""What tests bring upon a run, as callbacks by config: ``PYTHONPATH=tests/slurm``, ``allow_targets=[faults]``."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from qtrain.training import checkpoint
from qtrain.utils.atomic_write import atomic_write

FIRST_START = not int(os.environ.get("SLURM_RESTART_COUNT", 0))


class Slow(pl.Callback):
    """In a job's first start each batch takes ``seconds`` longer on one rank (on all: ``rank=None``)."""

    def __init__(self, *, metric_log: object, rank: int | None, seconds: float) -> None:
        self.rank = rank
        self.seconds = seconds

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if FIRST_START and (self.rank is None or trainer.global_rank == self.rank):
            time.sleep(self.seconds)


class DieWhileSaving(pl.Callback):
    """In a job's first start, rank 0 gets SIGKILL when half of the resume point after ``step`` is written."""

    def __init__(self, *, metric_log: object, step: int) -> None:
        self.step = step

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero and FIRST_START:
            checkpoint.write_atomically = self._write_half  # type: ignore[assignment]

    def _write_half(self, state: dict[str, Any], path: str | Path) -> None:
        whole = Path(path).with_suffix(".whole")
        whole.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.torch.save(state, whole)
        content = whole.read_bytes()
        whole.unlink()
        with atomic_write(Path(path)) as temporary:
            if state["global_step"] < self.step:
                temporary.write_bytes(content)
            else:
                temporary.write_bytes(content[: len(content) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
