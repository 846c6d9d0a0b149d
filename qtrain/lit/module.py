"""The thin LightningModule: one step, one validation, one optimizer; the final test is evaluation.py's."""

from __future__ import annotations

from typing import Any, final

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics.classification import MulticlassAccuracy

from qtrain.distill.objective import Objective
from qtrain.functional.losses import hard_loss
from qtrain.functional.random import seed_of
from qtrain.lit.optim import MakeOptimizer, parameter_groups
from qtrain.lit.step import StudentStep
from qtrain.models.teacher import Teacher
from qtrain.nn.project import project_weights_
from qtrain.quantizers.hooks import begin_step_
from qtrain.schedules.base import Schedule
from qtrain.spec import Batch


@final
class QATModule(pl.LightningModule):
    """Trains ``student`` on ``objective``; checkpoints hold both, and nothing of the teacher.

    Metrics: ``train/<term>`` and ``train/total`` per step, in nats; ``val/top1`` in percent and ``val/loss`` in nats.
    The learning rate is the optimizer's times ``lr_schedule`` at progress, the share of optimizer steps done.
    """

    def __init__(
        self,
        *,
        student: nn.Module,
        objective: Objective,
        teacher: Teacher | None,
        optimizer: MakeOptimizer,
        lr_schedule: Schedule,
        num_classes: int,
        seed: int,
        scale_lr: float | None = None,
        norm_decay: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.student = student
        self.objective = objective
        self._teacher = teacher  # a Teacher is no nn.Module: neither state dict nor optimizer see it
        self._make_optimizer = optimizer
        self._lr_schedule = lr_schedule
        self._seed = seed
        self._scale_lr, self._norm_decay = scale_lr, norm_decay
        step = StudentStep(student=student, objective=objective)
        # In a tuple, since the step's modules are registered above and must not be so twice.
        self._step = (torch.compile(step, fullgraph=True, dynamic=False) if compile else step,)
        self.top1 = MulticlassAccuracy(num_classes=num_classes, average="micro")

    def on_fit_start(self) -> None:
        if self._teacher is not None:
            self._teacher.to(self.device)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # Whatever the forward draws (dropout, stochastic depth) becomes a function of (seed, step).
        torch.manual_seed(seed_of(self._seed, self.global_step))
        progress = self.global_step / max(1, self._total_steps)
        begin_step_(self.student, seed=self._seed, step=self.global_step, progress=progress)
        self.objective.set_progress_(progress)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if self._teacher is None:
            losses = self._step[0](batch.image, batch.target)
        else:
            logits, features = self._teacher.answer(batch, self.current_epoch)
            losses = self._step[0](batch.image, batch.target, logits, features)
        self.log_dict({f"train/{name}": loss.detach() for name, loss in losses.items()}, batch_size=len(batch.image))
        return losses["total"]

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        super().optimizer_step(*arguments, **options)
        project_weights_(self.student)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        logits = self.student(batch.image)
        loss = hard_loss(logits, batch.target)
        self.log("val/loss", loss, on_epoch=True, batch_size=len(batch.image), sync_dist=True)
        self.top1.update(logits.float(), batch.target)

    def on_validation_epoch_end(self) -> None:
        self.log("val/top1", 100 * self.top1.compute(), sync_dist=False)
        self.top1.reset()

    def configure_optimizers(self) -> Any:
        groups = parameter_groups([self.student, self.objective], scale_lr=self._scale_lr, norm_decay=self._norm_decay)
        optimizer = self._make_optimizer(groups)
        self._total_steps = int(self.trainer.estimated_stepping_batches)
        schedule = LambdaLR(optimizer, lambda step: self._lr_schedule(step / max(1, self._total_steps)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
