"""Who teaches a student: its objective, and the teacher of which that makes use."""

import logging

import torch
from torch import nn

from qtrain.data.base import VisionData
from qtrain.data.fit_data import FitData
from qtrain.distillation.cached_teacher import CachedTeacher
from qtrain.distillation.objective import Objective
from qtrain.models.taps import feature_shapes
from qtrain.models.teacher import FrozenTeacher, Teacher
from qtrain.pipeline.build_model import example_input
from qtrain.pipeline.memory_format import settle_memory_format_
from qtrain.settings.run_settings import RunSettings
from qtrain.training.step import LearningTeacher
from qtrain.utils.errors import ConfigError, as_config_error

log = logging.getLogger(__name__)


def build_objective(settings: RunSettings, student: nn.Module, teacher: nn.Module | None, data: FitData) -> Objective:
    """The config's objective, its terms' parameters made for the layers that they compare."""
    objective: Objective = settings.objective.build()
    if objective.needs_teacher and teacher is None:
        raise ConfigError(
            "objective: a term compares with a teacher and there is none; name one, for instance "
            "teacher=cifar_resnet56, or take objective=hard"
        )
    bind(settings, objective, student, teacher, data)
    return objective


def bind(
    settings: RunSettings, objective: Objective, student: nn.Module, teacher: nn.Module | None, data: FitData
) -> None:
    """Make the parameters of ``objective`` for the layers that it compares; their start is a function of the seed."""
    shape = tuple(example_input(data.info).shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        objective.bind_(
            feature_shapes(student, objective.student_taps, shape),
            {} if teacher is None else feature_shapes(teacher, objective.teacher_taps, shape),
        )


def build_learning_teacher(
    settings: RunSettings, model: nn.Module, student: nn.Module, data: VisionData
) -> LearningTeacher:
    """A teacher that is trained by ``settings.teacher.objective``, in which the student answers as teacher."""
    if settings.teacher.objective is None:
        raise ConfigError(
            "teacher.learns: a teacher that learns needs an objective of its own; give "
            "+objective@teacher.objective=hard, or soft to learn from the student too"
        )
    if settings.teacher.mean is not None or settings.teacher.std is not None:
        raise ConfigError(
            "teacher.learns: a teacher that learns sees images as the student does; leave teacher.mean and std null"
        )
    if settings.teacher.cache.keeps is not None:
        log.warning("teacher.cache: a teacher that learns answers otherwise at each step; nothing is kept")
    settle_memory_format_(settings, model, data)
    objective: Objective = settings.teacher.objective.build()
    bind(settings, objective, model, student, data)
    return LearningTeacher(model=model, objective=objective)


def build_teacher(settings: RunSettings, model: nn.Module, objective: Objective, data: FitData) -> Teacher:
    """The frozen teacher with taps where ``objective`` looks; bf16 on a GPU that has it, where it is faster.

    Its answers are kept and replayed where ``settings.teacher.cache`` says so.
    """
    settle_memory_format_(settings, model, data)
    live = FrozenTeacher(
        model,
        names=objective.teacher_taps,
        mean=settings.teacher.mean,
        std=settings.teacher.std,
        data_mean=data.info.mean,
        data_std=data.info.std,
        bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        compile=settings.teacher.compile is True and not settings.teacher.shard,
        shard=settings.teacher.shard,
    )
    cache = settings.teacher.cache
    if cache.keeps is None:
        return live
    if live.names:
        log.warning("teacher.cache: keeps no features, and hints look at %s; it answers live", ", ".join(live.names))
        return live
    if not isinstance(data, VisionData):
        raise ConfigError("teacher.cache: the answers for images of one's own loaders are not kept; leave it none")
    with as_config_error("teacher.cache"):
        keeps = cache.keeps.build()(num_classes=data.info.num_classes)
    return CachedTeacher(live, data=data.identity(), keeps=keeps, folder=cache.folder)
