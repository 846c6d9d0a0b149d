"""When a teacher's answers are looked up and written: at the turn of epochs, and whenever the run saves itself."""

from __future__ import annotations

from typing import Any, final

import pytorch_lightning as pl
import torch

from qtrain.data.loader import EpochLoader
from qtrain.distill.cached_teacher import CachedTeacher


@final
class TeacherCacheUpdates(pl.Callback):
    """Tells ``teacher`` which samples of an epoch this rank will ask for, and lets it write before a resume point.

    A resume point is written after the answers of the steps before it, so that a run that was killed in the middle of
    an epoch completes that epoch's answers when it goes on.
    """

    def __init__(self, teacher: CachedTeacher) -> None:
        self._teacher = teacher
        self._epoch: int | None = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        loader = trainer.train_dataloader
        # Other loaders do not say what is to come: every epoch is live then.
        if isinstance(loader, EpochLoader) and loader.sampler.epoch != self._epoch:
            order, self._epoch = loader.sampler, loader.sampler.epoch
            batches = order.batches(self._epoch, batch_idx)[: _batches_left(trainer, batch_idx)]
            self._teacher.begin(self._epoch, torch.cat(batches), rank=trainer.global_rank)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._teacher.flush()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._teacher.flush()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._teacher.flush()


def _batches_left(trainer: pl.Trainer, batch_idx: int) -> int:
    """How many batches of this epoch will be trained on, the one at ``batch_idx`` included."""
    left = int(trainer.num_training_batches) - batch_idx
    if trainer.max_steps >= 0:
        left = min(left, (trainer.max_steps - trainer.global_step) * trainer.accumulate_grad_batches)
    return left
