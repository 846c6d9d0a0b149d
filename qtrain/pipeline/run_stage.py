"""One stage of a run: student, teacher and objective, from what the stage before left; then the fit."""

import copy
import logging
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import torch
from pytorch_lightning.loggers import Logger
from torch import Tensor, nn

from qtrain.convert.freeze import freeze_, layers_to_freeze
from qtrain.data.base import VisionData
from qtrain.distillation.objective import Objective
from qtrain.models.teacher import Teacher
from qtrain.nn.many_bits import in_use
from qtrain.pipeline import build_teacher
from qtrain.pipeline.compilation import AUTO, compiles, compiles_evaluation
from qtrain.pipeline.fit import accumulated_batches, fit, shards_student, shares_batches
from qtrain.pipeline.load_data import depends_on
from qtrain.pipeline.many_bits import narrow_objective
from qtrain.pipeline.prepare import Prepared
from qtrain.pipeline.pretrain import teacher_weights, trained_model
from qtrain.pipeline.run_cache import cached
from qtrain.pipeline.stages import Stage, StageResult, StageState
from qtrain.pipeline.trial_callbacks import trial_callbacks
from qtrain.settings.run_settings import RunSettings
from qtrain.spec import Position
from qtrain.tracking.run_tracking import tell_teacher
from qtrain.training.module import QATModule
from qtrain.training.step import LearningTeacher
from qtrain.utils.errors import ConfigError

log = logging.getLogger(__name__)

INSTABILITY = "instability"
"""Name in ``callbacks`` of what measures how unstable each layer is."""


def run_stage(
    stage: Stage,
    prepared: Prepared,
    before: StageState | None,
    data: VisionData,
    folder: Path,
    loggers: tuple[Logger, ...],
) -> StageResult:
    """Fit the student of ``prepared`` by the config of ``stage``; rows and curves go on in the run's ``folder``."""
    settings, student = stage.settings, prepared.student
    teacher_model = _teacher_model(settings, data, before)
    tell_teacher(loggers, lambda: teacher_weights(settings, data))
    objective = build_teacher.build_objective(settings, in_use(student), teacher_model, data)
    nobody_teaches = not (objective.needs_teacher or settings.teacher.learns or settings.many_bits.widths)
    data.train_on_labels_only(nobody_teaches)
    compiled, evaluation = compiles(settings, student, data), compiles_evaluation(settings, student, data)
    if compiled or evaluation:
        torch.compiler.reset()  # graphs of an earlier fit in this process would count against the limit for one
    if before is not None:
        _inherit_(objective, before.objective, stage.name)
    teacher = _teacher(settings, teacher_model, student, objective, data)
    _freeze_(settings, student, before)
    start = {} if before is None else {"start": before.end}
    # Several processes go on with a copy: each has a part of a sharded one, and its batch norms are others, which what
    # comes after training does not know.
    apart = shards_student(settings) or shares_batches(settings)
    module = QATModule(
        student=copy.deepcopy(student).to(memory_format=torch.contiguous_format) if apart else student,
        objective=objective,
        teacher=teacher,
        optimizer=settings.optimizer.build(),
        lr_schedule=settings.lr_schedule.build(),
        num_classes=data.info.num_classes,
        seed=settings.seed,
        scale_lr=settings.fit.scale_lr,
        teacher_lr=settings.teacher.lr,
        norm_decay=settings.fit.norm_decay,
        compile=compiled,
        or_eager=settings.fit.compile == AUTO,
        compile_evaluation=evaluation,
        sync_batchnorm=shares_batches(settings),
        optimizer_state=before.optimizer if before is not None and settings.fit.carry_optimizer else None,
        narrow_objective=narrow_objective(settings, student, data),
        **start,
    )
    result = fit(
        settings,
        module=module,
        data=data,
        folder=folder,
        identity=settings.identity,
        epochs=settings.fit.epochs,
        steps=_steps(settings, data),
        title=f"{folder.name} {stage.name}".strip(),
        loggers=loggers,
        command="python -m qtrain " + shlex.join(sys.argv[1:]),
        checkpoints=stage.folder / "checkpoints",
        trial_callbacks=trial_callbacks(before.end if before is not None else Position()),
        **start,
    )
    if apart:
        student.load_state_dict(dict(result.state.student.tensors))
    chosen = settings.teacher.model
    own = replace(result.state, teacher_model=None if chosen is None else dict(chosen.plain))
    return replace(result, student=student, allocation=prepared.allocation, state=own.after(before))


def _steps(settings: RunSettings, data: VisionData) -> int | None:
    """Optimizer steps where the stage takes a part of the run's epochs; ``None`` for whole epochs."""
    if not 0 < settings.fit.share <= 1:
        raise ConfigError(f"fit.share: must be above 0 and at most 1, got {settings.fit.share}")
    batches = len(data.train_dataloader())
    if settings.fit.share == 1:
        return None
    steps = -(-batches // accumulated_batches(settings))  # an epoch's last batches are a step too
    return max(1, round(settings.fit.share * settings.fit.epochs * steps))


def _teacher_model(settings: RunSettings, data: VisionData, before: StageState | None) -> nn.Module | None:
    chosen = settings.teacher.model
    if chosen is None:
        return None
    if chosen.target is None:
        raise ConfigError(
            "teacher.model: has options but names no model; take teacher=cifar_resnet56, or another of that group"
        )
    what = {**depends_on(settings), "teacher": chosen.plain, "channels_last": settings.fit.channels_last}
    model = cached("teacher", what, lambda: trained_model(chosen, settings, data))
    if before is not None and before.teacher is not None and before.teacher_model == chosen.plain:
        model.load_state_dict(before.teacher)
    return model


def _teacher(
    settings: RunSettings, model: nn.Module | None, student: nn.Module, objective: Objective, data: VisionData
) -> Teacher | LearningTeacher | None:
    if settings.teacher.learns:
        if model is None:
            raise ConfigError("teacher.learns: there is no teacher; name one, for instance teacher=cifar_resnet56")
        return build_teacher.build_learning_teacher(settings, model, student, data)
    if model is not None and objective.needs_teacher:
        return build_teacher.build_teacher(settings, model, objective, data)
    return None


def _freeze_(settings: RunSettings, student: nn.Module, before: StageState | None) -> None:
    """Let the layers that ``fit.freeze`` names, or most unstable by what an earlier stage measured, learn no more."""
    chosen, metrics = settings.fit.freeze, None if before is None else before.metrics.get(INSTABILITY)
    names = layers_to_freeze(student, patterns=chosen.layers or (), metrics=metrics, share=chosen.share)
    freeze_(student, names)
    if names:
        log.info("the weights of %d layers are frozen: %s", len(names), ", ".join(names))


def _inherit_(objective: Objective, former: dict[str, Tensor], stage: str) -> None:
    """Regressors that an earlier stage has trained go on; those of new terms start afresh."""
    own = objective.state_dict()
    known = {name: tensor for name, tensor in former.items() if name in own and own[name].shape == tensor.shape}
    objective.load_state_dict({**own, **known})
    if fresh := sorted(own.keys() - known.keys()):
        log.info("stage %s: %s of the objective start afresh", stage, ", ".join(fresh))
