"""One stage of a run: student, teacher and objective, from what the stage before left; then the fit."""

from __future__ import annotations

import copy
import logging
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.loggers import Logger
from torch import Tensor, nn

from qtrain.config.instantiate import instantiate
from qtrain.convert.freeze import freeze_
from qtrain.convert.inherit import student_state_of
from qtrain.data.base import VisionData
from qtrain.distill.objective import Objective
from qtrain.models.sharding import whole_state
from qtrain.models.teacher import Teacher
from qtrain.pipeline import build_teacher, run_folder
from qtrain.pipeline.fit import Fitted, fit, shards_student, shares_batches
from qtrain.pipeline.load_data import depends_on
from qtrain.pipeline.prepare import Prepared
from qtrain.pipeline.pretrain import trained_model
from qtrain.pipeline.run_cache import cached
from qtrain.pipeline.stages import Stage, StageState
from qtrain.pipeline.trial_callbacks import watchers
from qtrain.spec import Position
from qtrain.tracking.run_tracking import tell_teacher
from qtrain.training.module import QATModule
from qtrain.training.step import LearningTeacher
from qtrain.utils.errors import ConfigError

log = logging.getLogger(__name__)

INSTABILITY = "instability"
"""Name in ``callbacks`` of what measures how unstable each layer is."""


@dataclass(frozen=True)
class Trained:
    """A stage that has run: its student with its bits, how the fit went, and what is left to the next stage."""

    prepared: Prepared
    fitted: Fitted
    state: StageState


def run_stage(
    stage: Stage,
    prepared: Prepared,
    before: StageState | None,
    data: VisionData,
    folder: Path,
    loggers: tuple[Logger, ...],
) -> Trained:
    """Fit the student of ``prepared`` by the config of ``stage``; rows and curves go on in the run's ``folder``."""
    cfg, student = stage.cfg, prepared.student
    if cfg.fit.compile:
        torch.compiler.reset()  # graphs of an earlier fit in this process would count against the limit for one
    teacher_model = _teacher_model(cfg, data, before)
    tell_teacher(loggers, cfg, data)
    objective = build_teacher.build_objective(cfg, student, teacher_model, data)
    if before is not None:
        _inherit_(objective, before.objective, stage.name)
    teacher = _teacher(cfg, teacher_model, student, objective, data)
    _freeze_(cfg, student, before)
    start = {} if before is None else {"start": before.end}
    # Of a student that is sharded each process goes on with a copy, of which it has a part.
    apart = shards_student(cfg)
    module = QATModule(
        student=copy.deepcopy(student).to(memory_format=torch.contiguous_format) if apart else student,
        objective=objective,
        teacher=teacher,
        optimizer=instantiate(cfg.optimizer),
        lr_schedule=instantiate(cfg.lr_schedule),
        num_classes=data.info.num_classes,
        seed=cfg.seed,
        scale_lr=cfg.fit.scale_lr,
        teacher_lr=cfg.teacher.lr,
        norm_decay=cfg.fit.norm_decay,
        compile=cfg.fit.compile,
        sync_batchnorm=shares_batches(cfg),
        optimizer_state=before.optimizer if before is not None and cfg.fit.carry_optimizer else None,
        **start,
    )
    fitted = fit(
        cfg,
        module=module,
        data=data,
        folder=folder,
        identity=run_folder.identity_of(cfg),
        epochs=cfg.fit.epochs,
        steps=_steps(cfg, data),
        title=f"{folder.name} {stage.name}".strip(),
        loggers=loggers,
        command="python -m qtrain " + shlex.join(sys.argv[1:]),
        checkpoints=stage.folder / "checkpoints",
        watchers=watchers(before.end if before is not None else Position()),
        **start,
    )
    if apart:
        student.load_state_dict(whole_state(module.student))
    return Trained(prepared, fitted, _leave(cfg, student, objective, teacher, fitted, before))


def _steps(cfg: DictConfig, data: VisionData) -> int | None:
    """Optimizer steps where the stage takes a part of the run's epochs; ``None`` for whole epochs."""
    if not 0 < cfg.fit.share <= 1:
        raise ConfigError(f"fit.share: must be above 0 and at most 1, got {cfg.fit.share}")
    batches = len(data.train_dataloader())
    if cfg.fit.share == 1:
        return None
    return max(1, round(cfg.fit.share * cfg.fit.epochs * batches / cfg.trainer.accumulate_grad_batches))


def _teacher_model(cfg: DictConfig, data: VisionData, before: StageState | None) -> nn.Module | None:
    node = cfg.teacher.model
    if node is None:
        return None
    if "_target_" not in node:
        raise ConfigError(
            "teacher.model: has options but names no model; take teacher=cifar_resnet56, or another of that group"
        )
    what = {**depends_on(cfg), "teacher": _plain(node), "channels_last": cfg.fit.channels_last}
    model = cached("teacher", what, lambda: trained_model(node, cfg, data))
    if before is not None and before.teacher is not None and before.teacher_model == _plain(node):
        model.load_state_dict(before.teacher)
    return model


def _teacher(
    cfg: DictConfig, model: nn.Module | None, student: nn.Module, objective: Objective, data: VisionData
) -> Teacher | LearningTeacher | None:
    if cfg.teacher.learns:
        if model is None:
            raise ConfigError("teacher.learns: there is no teacher; name one, for instance teacher=cifar_resnet56")
        return build_teacher.build_learning_teacher(cfg, model, student, data)
    if model is not None and objective.needs_teacher:
        return build_teacher.build_teacher(cfg, model, objective, data)
    return None


def _freeze_(cfg: DictConfig, student: nn.Module, before: StageState | None) -> None:
    """Let the layers that ``fit.freeze`` names, or most unstable by what an earlier stage measured, learn no more."""
    metrics = None if before is None else before.metrics.get(INSTABILITY)
    names = freeze_(student, patterns=cfg.fit.freeze.layers or (), metrics=metrics, share=cfg.fit.freeze.share)
    if names:
        log.info("the weights of %d layers are frozen: %s", len(names), ", ".join(names))


def _inherit_(objective: Objective, former: dict[str, Tensor], stage: str) -> None:
    """Regressors that an earlier stage has trained go on; those of new terms start afresh."""
    own = objective.state_dict()
    known = {name: tensor for name, tensor in former.items() if name in own and own[name].shape == tensor.shape}
    objective.load_state_dict({**own, **known})
    if fresh := sorted(own.keys() - known.keys()):
        log.info("stage %s: %s of the objective start afresh", stage, ", ".join(fresh))


def _leave(
    cfg: DictConfig,
    student: nn.Module,
    objective: Objective,
    teacher: Teacher | LearningTeacher | None,
    fitted: Fitted,
    before: StageState | None,
) -> StageState:
    """What this stage leaves; a teacher or metrics that it did not change are handed on."""
    learned = teacher if isinstance(teacher, LearningTeacher) else None
    terms = (*(before.distill if before else ()), *objective.teacher_terms)
    return StageState(
        student=student_state_of(student),
        end=fitted.end,
        objective=_on_cpu(objective),
        optimizer=fitted.optimizer,
        teacher=_on_cpu(learned.model) if learned else before.teacher if before else None,
        teacher_model=_plain(cfg.teacher.model) if learned else before.teacher_model if before else None,
        metrics={**(before.metrics if before else {}), **fitted.metrics},
        train_s=fitted.train_s + (before.train_s if before else 0.0),
        distill=tuple(dict.fromkeys(terms)),
    )


def _on_cpu(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in module.state_dict().items()}


def _plain(node: DictConfig) -> dict[str, object]:
    plain = OmegaConf.to_container(node, resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}
