"""Reads and writes a teacher's cached outputs when an epoch begins or ends and before the run is saved."""

from typing import Any, final

import pytorch_lightning as pl
import torch

from qtrain.data.loader import EpochLoader
from qtrain.distillation.cached_teacher import CachedTeacher


@final
class TeacherCacheUpdates(pl.Callback):
    """Tells ``teacher`` which samples of an epoch this rank will need, and writes its outputs before a resume point.

    So a run that was killed in the middle of an epoch has the outputs for all steps before the resume point, and
    completes those of the epoch when it is resumed.
    """

    def __init__(self, teacher: CachedTeacher) -> None:
        self._teacher = teacher
        self._epoch: int | None = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        loader = trainer.train_dataloader
        # Other loaders do not tell which samples come next, so the teacher runs in every epoch.
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
    """The number of batches of this epoch that are still to be trained on, including that at ``batch_idx``."""
    left = int(trainer.num_training_batches) - batch_idx
    if trainer.max_steps >= 0:
        left = min(left, (trainer.max_steps - trainer.global_step) * trainer.accumulate_grad_batches)
    return left
