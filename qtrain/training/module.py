"""The LightningModule: training step, validation and optimizer; evaluation.py does the final test."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, final

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics.classification import MulticlassAccuracy

from qtrain.distillation.cached_teacher import CachedTeacher
from qtrain.distillation.objective import Objective
from qtrain.functional.losses import hard_loss
from qtrain.functional.random import seed_of
from qtrain.models.sharding import is_sharded, whole_weights
from qtrain.models.teacher import Teacher
from qtrain.nn.many_bits import ManyBits, label
from qtrain.nn.project import moves_weights, partition_weights_, project_weights_
from qtrain.nn.sync_batchnorm import sync_batchnorm_
from qtrain.quantizers.hooks import begin_step_, share_penalties_
from qtrain.schedules.base import Schedule
from qtrain.spec import Batch, Position
from qtrain.training.callbacks.teacher_cache import TeacherCacheUpdates
from qtrain.training.computed_step import ComputedStep
from qtrain.training.fused import use_fused_
from qtrain.training.optim import MakeOptimizer, load_optimizer_state_, parameter_groups, still_accumulating
from qtrain.training.step import LearningTeacher, ManyBitsStep, StudentStep
from qtrain.utils.compiled import Compiled

GAVE_UP = "qtrain_gave_up_compiling"
"""Key of a checkpoint: the step could not be compiled."""


@final
class QATModule(pl.LightningModule):
    """Trains ``student`` on ``objective``; checkpoints contain both, but not a frozen teacher.

    A teacher that learns is trained too, at ``teacher_lr`` if that is given, and is in the checkpoint.

    Metrics: ``train/<term>`` and ``train/total`` per step, in nats; ``val/top1`` in percent and ``val/loss`` in nats.
    The learning rate is that of the optimizer times ``lr_schedule`` at the progress, the finished share of this fit's
    steps. With ``compile`` the step is one compiled graph; with ``or_eager`` too, a step that cannot be compiled is
    trained all the same, and so it is when the fit goes on from a checkpoint. ``compile_evaluation`` compiles the
    forward of validation, as far as batches have the size of the first. With ``sync_batchnorm`` batch norm takes its
    statistics over the batches of all ranks. ``start`` is the run's progress when the fit begins; seeds and the
    teacher's epochs continue from there. ``optimizer_state`` is the optimizer's state dict from the stage before, if
    its moments are to be kept. ``teacher_logits`` are the outputs of a frozen teacher for the last batch, for
    callbacks. A student of many bits needs a ``narrow_objective``, by which its widest trains the others;
    ``train/w4/<term>`` and ``val/w4/top1`` are then of each width.
    """

    def __init__(
        self,
        *,
        student: nn.Module,
        objective: Objective,
        teacher: Teacher | LearningTeacher | None,
        optimizer: MakeOptimizer,
        lr_schedule: Schedule,
        num_classes: int,
        seed: int,
        scale_lr: float | None = None,
        teacher_lr: float | None = None,
        norm_decay: bool = False,
        compile: bool = False,
        or_eager: bool = False,
        compile_evaluation: bool = False,
        sync_batchnorm: bool = False,
        start: Position = Position(),  # noqa: B008 - immutable
        optimizer_state: dict[str, Any] | None = None,
        narrow_objective: Objective | None = None,
    ) -> None:
        super().__init__()
        if sync_batchnorm:  # before anything looks at a layer
            sync_batchnorm_(student)
            if isinstance(teacher, LearningTeacher):
                sync_batchnorm_(teacher.model)
        self.student = student
        self.objective = objective
        self.narrow_objective = narrow_objective
        # A frozen teacher is not an nn.Module, so it is neither in the state dict nor in the optimizer.
        self._teacher = None if isinstance(teacher, LearningTeacher) else teacher
        self.learning_teacher = teacher if isinstance(teacher, LearningTeacher) else None
        self.teacher_logits: Tensor | None = None
        self._teacher_lr = teacher_lr
        self._make_optimizer = optimizer
        self._lr_schedule = lr_schedule
        self._seed, self._start = seed, start
        self._optimizer_state = optimizer_state
        self._scale_lr, self._norm_decay = scale_lr, norm_decay
        self._or_eager = or_eager
        step: nn.Module
        if isinstance(student, ManyBits):
            assert narrow_objective is not None
            step = ManyBitsStep(student=student, objective=objective, narrow=narrow_objective)
        else:
            step = StudentStep(student=student, objective=objective, teacher=self.learning_teacher)
        self._step = ComputedStep(step, student, compile=compile, or_eager=or_eager)
        self._forward = Compiled(student, or_eager=True, what="evaluation") if compile_evaluation else None
        self._evaluated = 0
        """Images of the first validation batch."""
        names = [label(bits) for bits in student.others] if isinstance(student, ManyBits) else []
        self.top1 = MulticlassAccuracy(num_classes=num_classes, average="micro")
        self.narrow_top1 = nn.ModuleDict(
            {name: MulticlassAccuracy(num_classes=num_classes, average="micro") for name in names}
        )

    def configure_callbacks(self) -> list[pl.Callback]:
        return [TeacherCacheUpdates(self._teacher)] if isinstance(self._teacher, CachedTeacher) else []

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[GAVE_UP] = self._step.gave_up

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # A compiled step rounds otherwise, so a run does not change over in the middle.
        if self._or_eager:
            self._step.gave_up = bool(checkpoint.get(GAVE_UP, False))

    @property
    def compiles(self) -> bool:
        """Whether the step is compiled."""
        return self._step.compiles

    def on_fit_start(self) -> None:
        if self._teacher is not None:
            self._teacher.to(self.device)
        once = self._step.held if self._accumulates() else frozenset()
        share_penalties_(self.student, 1 / self.trainer.accumulate_grad_batches, once=once)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # Makes random numbers of the forward (dropout, stochastic depth) a function of the seed and the place; each
        # rank has its own, as the images of a batch have.
        step = self._start.step + self.global_step
        place, rank = batch_idx % self.trainer.accumulate_grad_batches, self.global_rank
        where = (place, rank) if rank else (place,) if place else ()
        torch.manual_seed(seed_of(self._seed, step, *where))
        if place:
            return  # weights, quantizers and objective stay as they are until the optimizer's step
        progress = self.global_step / max(1, self._total_steps)
        begin_step_(self.student, seed=self._seed, step=step, progress=progress)
        with self._weights_in_reach():
            partition_weights_(self.student)
        self.objective.set_progress_(progress)
        if self.narrow_objective is not None:
            self.narrow_objective.set_progress_(progress)
        if self.learning_teacher is not None:
            self.learning_teacher.objective.set_progress_(progress)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The unweighted losses of a training ``batch`` by name, and ``total``; calls a frozen teacher for it."""
        if self._teacher is None:
            losses = self._step(batch.image, batch.target)
        else:
            logits, features = self._teacher.answer(batch, self._start.epoch + self.current_epoch)
            losses = self._step(batch.image, batch.target, logits, features)
            self.teacher_logits = logits
        return losses

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        last = not still_accumulating(self.trainer)
        with self._step.hold(last=last) if self._accumulates() else nullcontext():
            losses = self.losses(batch)
        self.log_dict({f"train/{name}": loss.detach() for name, loss in losses.items()}, batch_size=len(batch.image))
        return losses["total"]

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        super().optimizer_step(*arguments, **options)
        with self._weights_in_reach():
            project_weights_(self.student)

    def _accumulates(self) -> bool:
        """Whether several batches make a step, and their ranks have whole weights to share among them."""
        return self.trainer.accumulate_grad_batches > 1 and not is_sharded(self.student)

    def _weights_in_reach(self) -> AbstractContextManager[None]:
        """Inside, each rank has the whole weights, if quantizers change weights themselves."""
        if is_sharded(self.student) and moves_weights(self.student):
            return whole_weights(self.student, write=True)
        return nullcontext()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluated = self._evaluated or len(batch.image)
        forward = self._forward if self._forward and len(batch.image) == self._evaluated else self.student
        logits = forward(batch.image)
        loss = hard_loss(logits, batch.target)
        self.log("val/loss", loss, on_epoch=True, batch_size=len(batch.image), sync_dist=True)
        self.top1.update(logits.float(), batch.target)
        for name, metric in self._narrow_top1():
            metric.update(self.student.get_submodule(name)(batch.image).float(), batch.target)

    def on_validation_epoch_end(self) -> None:
        for name, metric in [("", self.top1), *self._narrow_top1()]:
            self.log(f"val/{name}/top1".replace("//", "/"), 100 * metric.compute(), sync_dist=False)
            metric.reset()

    def _narrow_top1(self) -> list[tuple[str, MulticlassAccuracy]]:
        return [(name, one) for name, one in self.narrow_top1.items() if isinstance(one, MulticlassAccuracy)]

    def configure_optimizers(self) -> Any:
        trained = [one for one in (self.student, self.objective, self.narrow_objective) if one is not None]
        groups = parameter_groups(trained, scale_lr=self._scale_lr, norm_decay=self._norm_decay)
        if self.learning_teacher is not None:
            groups += _teacher_groups(self.learning_teacher, lr=self._teacher_lr, norm_decay=self._norm_decay)
        optimizer = self._make_optimizer(groups)
        use_fused_(optimizer)
        if self._optimizer_state is not None:
            _carry_on_(optimizer, self._optimizer_state)
        self._total_steps = int(self.trainer.estimated_stepping_batches)
        schedule = LambdaLR(optimizer, lambda step: self._lr_schedule(step / max(1, self._total_steps)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _teacher_groups(teacher: LearningTeacher, *, lr: float | None, norm_decay: bool) -> list[dict[str, Any]]:
    """The parameter groups of a teacher that learns, with their own names and the rate ``lr`` if one is given."""
    rate = {} if lr is None else {"lr": lr}
    groups = parameter_groups([teacher], norm_decay=norm_decay)
    return [{**group, **rate, "name": f"teacher_{group['name']}"} for group in groups]


def _carry_on_(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load the moments in ``state`` into ``optimizer``, which keeps its own rates."""
    own = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    sizes = [[len(group["params"]) for group in groups] for groups in (optimizer.param_groups, state["param_groups"])]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"fit.carry_optimizer: the stage before trained groups of {sizes[1]} parameters, this one trains "
            f"{sizes[0]}; leave it false where what is trained differs"
        )
    load_optimizer_state_(optimizer, state)
    for group, options in zip(optimizer.param_groups, own, strict=True):
        group.update(options)
        group.pop("initial_lr", None)  # of the former stage's schedule, which a new one would go on from
