"""Stop in good order: save at the end of the batch, say how to go on, leave.

Floor 5. Not by ``trainer.should_stop``: Lightning would validate, call the epoch finished, and a run resumed from
there would miss the rest of it. An exception leaves everything as the resume point has it.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, final

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint

from qtrain.lit.checkpoint import list_resume_points
from qtrain.lit.resume import ResumePoints
from qtrain.lit.signals import RunInterruptedError, SignalNote

log = logging.getLogger(__name__)


@final
class StopOnSignal(Checkpoint):
    """On SIGINT or SIGTERM: save through ``resume_points``, log ``command``, raise ``RunInterruptedError``.

    ``command`` is the line that resumes the run. With several ranks they agree every ``agree_every_n_steps`` steps
    whether one of them got a signal, since asking costs an all-reduce; one process looks at each step. A
    ``Checkpoint``, so that Lightning calls it after the callbacks whose state is saved.
    """

    def __init__(self, *, resume_points: ResumePoints, command: str = "", agree_every_n_steps: int = 16) -> None:
        super().__init__()
        self.resume_points = resume_points
        self.command = command
        self.agree_every_n_steps = agree_every_n_steps
        self.note = SignalNote()

    @property
    def interrupted(self) -> bool:
        """Whether a signal came."""
        return self.note.signum is not None

    # Not in setup(): Lightning installs its own handlers after that, and this one must come last and go first.
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.note.install()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.note.restore()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.note.restore()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._agreed(trainer, batch_idx) and self.resume_points.save_within_epoch(trainer):
            self._stop()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._agreed(trainer, -1):
            self.resume_points.on_train_epoch_end(trainer, pl_module)
            self._stop()

    def _agreed(self, trainer: pl.Trainer, batch_idx: int) -> bool:
        if trainer.world_size == 1:
            return self.interrupted
        if (batch_idx + 1) % self.agree_every_n_steps != 0:
            return False
        return bool(trainer.strategy.reduce_boolean_decision(self.interrupted, all=False))

    def _stop(self) -> None:
        points = list_resume_points(self.resume_points.folder)
        newest: Path | None = points[-1][1] if points else None
        error = RunInterruptedError(signum=self.note.signum or 15, resume_point=newest)
        log.warning("%s%s", error, f"; resume with: {self.command}" if self.command else "")
        raise error
