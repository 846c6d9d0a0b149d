"""Stops a run after a signal: saves at the end of the batch, logs how to resume, and raises an exception.

``trainer.should_stop`` is not used, because Lightning would then validate and count the epoch as finished, and the
resumed run would miss the rest of it. An exception leaves everything as it is in the resume point.

Within a SLURM job, SIGUSR1 and the SIGTERM of a preemption requeue the job, and its new start resumes the run.
Lightning's own support for this is not used: it saves in the signal handler, which deadlocks if ranks are at different
batches.
"""

import logging
import signal
from pathlib import Path
from typing import Any, final

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint

from qtrain.training.checkpoint import list_resume_points
from qtrain.training.resume import ResumePoints
from qtrain.training.signals import HANDLED, close_note, training_note
from qtrain.training.slurm import SlurmJob
from qtrain.utils.errors import RunInterruptedError

log = logging.getLogger(__name__)


@final
class StopOnSignal(Checkpoint):
    """On SIGINT, SIGTERM or SIGUSR1 saves by ``resume_points``, logs ``command`` and raises ``RunInterruptedError``.

    ``command`` is the command line that resumes the run; it is not logged if the SLURM job is requeued. Several ranks
    agree every ``agree_every_n_batches`` batches whether one of them got a signal, since that costs an all-reduce. A
    single process checks at each batch. What was agreed on holds until the next batch behind which the run can be
    saved. It is a ``Checkpoint`` because Lightning calls these after all other callbacks, whose state is saved.
    """

    def __init__(self, *, resume_points: ResumePoints, command: str = "", agree_every_n_batches: int = 16) -> None:
        super().__init__()
        self.resume_points = resume_points
        self.command = command
        self.agree_every_n_batches = agree_every_n_batches
        self.note = training_note()
        self._signum: signal.Signals | None = None

    @property
    def interrupted(self) -> bool:
        """Whether a signal came."""
        return self.note.signum is not None

    # Not in setup(): Lightning installs its own handlers after that; ours must be installed last and removed first.
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.note.install()
        if trainer.is_global_zero and (job := SlurmJob.current()) is not None:
            log.info("%s: training begins at step %d, epoch %d", job, trainer.global_step, trainer.current_epoch)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.note.restore()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if not (isinstance(exception, RunInterruptedError) and exception.requeued_job):
            self.note.restore()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._signum = self._signum or self._agreed(trainer, batch_idx)
        if self._signum and self.resume_points.save_within_epoch(trainer):
            self._stop(trainer, self._signum)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if signum := self._signum or self._agreed(trainer, -1):
            self.resume_points.on_train_epoch_end(trainer, pl_module)
            self._stop(trainer, signum)

    def _agreed(self, trainer: pl.Trainer, batch_idx: int) -> signal.Signals | None:
        """The signal that any rank got; all ranks return the same one."""
        if trainer.world_size == 1:
            return self.note.signum
        if (batch_idx + 1) % self.agree_every_n_batches != 0:
            return None
        rank = 0 if self.note.signum is None else 1 + HANDLED.index(self.note.signum)
        most = trainer.strategy.reduce(torch.tensor(rank, device=trainer.strategy.root_device), reduce_op="max")
        return HANDLED[int(most) - 1] if int(most) else None

    def _stop(self, trainer: pl.Trainer, signum: signal.Signals) -> None:
        close_note(self.note)
        points = list_resume_points(self.resume_points.folder)
        newest: Path | None = points[-1][1] if points else None
        requeued = trainer.strategy.broadcast(self._requeued(signum) if trainer.is_global_zero else None)
        job = requeued.number if requeued else None
        error = RunInterruptedError(signum=signum, resume_point=newest, requeued_job=job)
        log.warning("%s%s", error, f"; resume with: {self.command}" if self.command and not requeued else "")
        raise error

    def _requeued(self, signum: int) -> SlurmJob | None:
        job = SlurmJob.current()
        if job is None or not (signum == signal.SIGUSR1 or (signum == signal.SIGTERM and job.preempted())):
            return None
        return job if job.requeue() else None
