"""Floor 6: from a config to data, full-precision models, a quantised student and its teacher.

The one place that says in which order a student is made: load (or train) the full-precision weights, find the layers,
give them bits, swap them, calibrate. Folding, equalization and correction will stand between these steps.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from qtrain.convert.calibrate import calibrate
from qtrain.convert.freeze import layers_to_freeze
from qtrain.convert.inherit import Heritage, inherit_quantizers_, inherit_weights_
from qtrain.convert.layers import find_layers
from qtrain.convert.operations import expose_operations
from qtrain.convert.plan import LayerPlan, plan_layers
from qtrain.convert.swap import swap_layers
from qtrain.convert.switch import switch_bits_
from qtrain.data.base import VisionData
from qtrain.distill.cached_teacher import CachedTeacher
from qtrain.distill.logit_format import Full, TopK
from qtrain.distill.objective import Objective
from qtrain.lit.step import LearningTeacher
from qtrain.models.forms import merge_fused_biases
from qtrain.models.taps import feature_shapes
from qtrain.models.teacher import FrozenTeacher, Teacher
from qtrain.quantizers.base import MakeQuantizer
from qtrain.quantizers.wrapper import Wrapper
from qtrain.spec import FULL_PRECISION, Allocation, LayerBits
from qtrain.tasks.build import build_model, example_input
from qtrain.tasks.instantiate import instantiate
from qtrain.tasks.targets import ConfigError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """A student ready to fit; ``allocation`` is empty where it stays in full precision."""

    student: nn.Module
    allocation: Allocation


def quantise(cfg: DictConfig, model: nn.Module, data: VisionData, heritage: Heritage | None = None) -> Prepared:
    """Convert and calibrate ``model`` in place by ``cfg.quantize``, on the CPU or wherever the model is.

    With the ``heritage`` of an earlier stage the weights are that stage's, and so are quantizers of the same kind;
    where bits differ, their scales are fitted to the new ones.
    """
    if cfg.fit.channels_last:
        model.to(memory_format=torch.channels_last)
    plans = convert(cfg, model, example_input(data.info)) if cfg.quantize.enabled else {}
    if heritage is not None:
        with _as_config_error("stages"):
            inherit_weights_(model, heritage)
    if plans:
        batches = cfg.quantize.calibration_batches
        log.info("calibrating %d layers on %d batches", len(plans), batches)
        images = [batch.image for batch in data.calibration_batches(batches)]
        calibrate(model, images, plans)
        if heritage is not None and (wanted := inherit_quantizers_(model, heritage)):
            log.info("new bits for %d layers", len(wanted))
            switch_bits_(model, wanted, images=images[0])
    return Prepared(model, {name: plan.bits for name, plan in plans.items()})


@contextmanager
def _as_config_error(where: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"{where}: {str(error).removeprefix(f'{where}: ')}") from error


def convert(cfg: DictConfig, model: nn.Module, example: torch.Tensor) -> dict[str, LayerPlan]:
    """Swap the layers of ``model`` in place by ``cfg.quantize``, not calibrated yet; what was planned for each."""
    q = cfg.quantize
    operations = {str(kind): int(bits) for kind, bits in q.operations.items() if bits is not None}
    merge_fused_biases(model)
    try:
        expose_operations(model, operations, example)
        found = find_layers(model, example)
        allocation: Allocation = instantiate(q.bits)(found.weighted)
        operands = {name: LayerBits(FULL_PRECISION, operations[kind]) for name, kind in found.operands.items()}
        plans = plan_layers(found, {**allocation, **operands}, _recipe(cfg), instantiate(q.policies))
        swap_layers(model, found, plans, gradient=instantiate(q.gradient) or None)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"quantize: {error}") from error
    return plans


def rehearse(cfg: DictConfig, data: VisionData) -> None:
    """Convert a model that nobody keeps, so that what cannot be quantised is said before hours of pretraining.

    Only where weights have to be trained first; otherwise the conversion itself is next.
    """
    if not cfg.quantize.enabled or cfg.model.get("weights") is not None:
        return
    logger = logging.getLogger("qtrain.convert")
    level = logger.level
    logger.setLevel(logging.ERROR)  # what stays in full precision is said by the conversion that counts
    model = build_model(cfg.model, data.info)
    try:
        convert(cfg, model, example_input(data.info))
    finally:
        logger.setLevel(level)
    layers_to_freeze(model, patterns=cfg.fit.freeze.layers or ())


def _recipe(cfg: DictConfig) -> LayerPlan:
    """What all layers get that no policy changes."""
    q = cfg.quantize
    parts = {name: instantiate(q[name]) for name in ("weight", "input", "weight_observer", "input_observer")}
    if q.get("weight_wrapper") is not None:  # a run of an earlier version has no such key
        parts["weight"] = _wrapped(instantiate(q.weight_wrapper), parts["weight"])
    return LayerPlan(**parts)


def _wrapped(wrapper: Any, quantizer: MakeQuantizer) -> MakeQuantizer:
    """``quantizer`` inside ``wrapper``, whatever that would hold by its own config."""
    kind = getattr(wrapper, "func", None)
    if not (isinstance(kind, type) and issubclass(kind, Wrapper)):
        raise ConfigError(
            f"quantize.weight_wrapper: {getattr(kind, '__name__', wrapper)} holds no other quantizer; take "
            "quant_noise, oscillation or incremental, or set quantize.weight itself"
        )
    return partial(wrapper, quantizer=quantizer)


def build_objective(cfg: DictConfig, student: nn.Module, teacher: nn.Module | None, data: VisionData) -> Objective:
    """The config's objective, its terms' parameters made for the layers that they compare."""
    objective: Objective = instantiate(cfg.objective)
    if objective.needs_teacher and teacher is None:
        raise ConfigError(
            "objective: a term compares with a teacher and there is none; name one, for instance "
            "teacher=cifar_resnet56, or take objective=hard"
        )
    _bind(cfg, objective, student, teacher, data)
    return objective


def _bind(
    cfg: DictConfig, objective: Objective, student: nn.Module, teacher: nn.Module | None, data: VisionData
) -> None:
    """Make the parameters of ``objective`` for the layers that it compares; their start is a function of the seed."""
    shape = tuple(example_input(data.info).shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        objective.bind_(
            feature_shapes(student, objective.student_taps, shape),
            {} if teacher is None else feature_shapes(teacher, objective.teacher_taps, shape),
        )


def build_learning_teacher(cfg: DictConfig, model: nn.Module, student: nn.Module, data: VisionData) -> LearningTeacher:
    """A teacher that is trained by ``cfg.teacher.objective``, in which the student answers as teacher."""
    if cfg.teacher.objective is None:
        raise ConfigError(
            "teacher.learns: a teacher that learns needs an objective of its own; give "
            "+objective@teacher.objective=hard, or soft to learn from the student too"
        )
    if cfg.teacher.mean is not None or cfg.teacher.std is not None:
        raise ConfigError(
            "teacher.learns: a teacher that learns sees images as the student does; leave teacher.mean and std null"
        )
    if cfg.teacher.cache.kind != "none":
        log.warning("teacher.cache: a teacher that learns answers otherwise at each step; nothing is kept")
    if cfg.fit.channels_last:
        model.to(memory_format=torch.channels_last)
    objective: Objective = instantiate(cfg.teacher.objective)
    _bind(cfg, objective, model, student, data)
    return LearningTeacher(model=model, objective=objective)


def build_teacher(cfg: DictConfig, model: nn.Module, objective: Objective, data: VisionData) -> Teacher:
    """The frozen teacher with taps where ``objective`` looks; bf16 on a GPU that has it, where it is faster.

    Its answers are kept and replayed where ``cfg.teacher.cache`` says so.
    """
    if cfg.fit.channels_last:
        model.to(memory_format=torch.channels_last)
    live = FrozenTeacher(
        model,
        names=objective.teacher_taps,
        mean=cfg.teacher.mean,
        std=cfg.teacher.std,
        data_mean=data.info.mean,
        data_std=data.info.std,
        bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        compile=cfg.teacher.compile,
    )
    cache = cfg.teacher.cache
    if cache.kind == "none":
        return live
    if live.names:
        log.warning("teacher.cache: keeps no features, and hints look at %s; it answers live", ", ".join(live.names))
        return live
    classes = data.info.num_classes
    with _as_config_error("teacher.cache"):
        keeps = Full(num_classes=classes) if cache.kind == "full" else TopK(num_classes=classes, k=cache.k)
    return CachedTeacher(live, data=data.identity(), keeps=keeps, folder=cache.folder)
