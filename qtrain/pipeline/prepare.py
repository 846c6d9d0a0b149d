"""From a full-precision model to a quantized student.

The one place that says in which order a student is made: merge batch norm, equalize, find the layers, give them bits,
swap them, calibrate, learn how to round, correct biases. Loading comes before, fitting after.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from qtrain.convert.calibrate import calibrate_inputs, calibrate_weights, observe_inputs, observe_weights
from qtrain.convert.fold import OutputStatistics, fold_batchnorm_, fold_in_training_
from qtrain.convert.freeze import layers_to_freeze
from qtrain.convert.inherit import StudentState, inherit_quantizers_, inherit_weights_
from qtrain.convert.layers import find_layers
from qtrain.convert.operations import expose_operations
from qtrain.convert.plan import IN_FLOAT, LayerPlan, plan_layers
from qtrain.convert.swap import swap_layers
from qtrain.convert.switch import switch_bits_
from qtrain.convert.target import Target
from qtrain.convert.tensors import readings, share_quantizers_
from qtrain.data.base import VisionData
from qtrain.deployment.lint import lint, summary
from qtrain.deployment.onnx.biases import round_biases_
from qtrain.models.layer_kinds import merge_fused_biases
from qtrain.observers.base import Observer
from qtrain.pipeline.build_model import build_model, example_input
from qtrain.pipeline.build_teacher import build_objective
from qtrain.pipeline.load_data import depends_on, recipe_of
from qtrain.pipeline.memory_format import settle_memory_format_
from qtrain.pipeline.pretrain import of_members
from qtrain.pipeline.run_cache import cached
from qtrain.ptq.bias_correction import BiasCorrection
from qtrain.ptq.calibrate_from_bn import calibrate_from_statistics
from qtrain.ptq.rounding.base import Rounding
from qtrain.quantizers.base import MakeQuantizer, Quantizer
from qtrain.quantizers.wrappers.wrapper import Wrapper
from qtrain.settings.component import built
from qtrain.settings.run_settings import RunSettings
from qtrain.spec import FULL_PRECISION, Allocation, LayerBits
from qtrain.utils.errors import ConfigError, as_config_error

log = logging.getLogger(__name__)

REASONS = 2
"""So many layers are named where none can be quantized."""


@dataclass(frozen=True)
class Prepared:
    """A student ready to fit; ``allocation`` is empty where it stays in full precision."""

    student: nn.Module
    allocation: Allocation


@dataclass(frozen=True)
class Converted:
    """What conversion did: a plan for each layer, and what merged batch norms knew of the layers' outputs.

    ``skipped`` are the layers and weights that stay in full precision, with the reason for each.
    """

    plans: dict[str, LayerPlan]
    statistics: dict[str, OutputStatistics]
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def allocation(self) -> Allocation:
        return {name: plan.bits for name, plan in self.plans.items()}


def prepare_student(
    settings: RunSettings, model: nn.Module, data: VisionData, student_state: StudentState | None = None
) -> Prepared:
    """Convert and calibrate ``model`` in place by ``settings.quantize``, on the CPU or wherever the model is.

    Then rounding is learned and biases are corrected, where the config asks for it. With the ``student_state`` of an
    earlier stage the weights are that stage's, and so are quantizers of the same kind; where bits differ, their scales
    are fitted to the new ones.
    """
    settle_memory_format_(settings, model, data)
    if not settings.quantize.enabled:
        converted = Converted({}, {})
    else:
        converted = convert(settings, model, example_input(data.info).to(next(model.parameters()).device))
    if student_state is not None:
        with as_config_error("stages"):
            inherit_weights_(model, student_state)
    if converted.plans:
        images = _calibrate(settings, model, data, converted, afresh=student_state is None)
        if student_state is None:
            correct_(settings, model, images, converted)
        elif wanted := inherit_quantizers_(model, student_state):
            log.info("new bits for %d layers", len(wanted))
            switch_bits_(model, wanted, images=images[0])
        if (target := target_of(settings)) is not None:
            log.info("%s; task=lint lists all", summary(lint(model, target, converted.skipped), model, target))
    return Prepared(model, converted.allocation)


def needs_images(settings: RunSettings) -> bool:
    """Whether a student that is not trained needs images at all: data-free methods do without."""
    q = settings.quantize
    parts = [part.build() for part in (q.rounding, q.bias) if part is not None]
    return q.enabled and (q.calibration == "images" or any(part.needs_images for part in parts))


def _calibrate(
    settings: RunSettings, model: nn.Module, data: VisionData, converted: Converted, *, afresh: bool
) -> list[torch.Tensor]:
    """Fill the quantizers; returns the images that served, or that later corrections need.

    ``afresh``: the weights are the full-precision model's own, so that what is observed is a function of the config.
    """
    q, images = settings.quantize, []
    if needs_images(settings):
        device = next(model.parameters()).device
        images = [batch.image.to(device) for batch in data.calibration_batches(q.calibration_batches)]
    if q.calibration == "images":
        log.info("calibrating %d layers on %d batches", len(converted.plans), len(images))
        seen = _observe(settings, model, images, converted, afresh=afresh)
        calibrate_weights(model, seen.weights)
        calibrate_inputs(model, seen.inputs)
        return images
    log.info("calibrating %d layers from the statistics of batch norm", len(converted.plans))
    mean, std = torch.tensor(data.info.mean), torch.tensor(data.info.std)
    with as_config_error("quantize.calibration"):
        calibrate_from_statistics(model, converted.plans, converted.statistics, low=-mean / std, high=(1 - mean) / std)
    return images


class _Seen(NamedTuple):
    """Observers of the layers' weights and of their inputs, by the layer's name."""

    weights: dict[str, Observer]
    inputs: dict[str, Observer]


def _observe(
    settings: RunSettings, model: nn.Module, images: list[torch.Tensor], converted: Converted, *, afresh: bool
) -> _Seen:
    """What is seen of the model in full precision, hence the same at any bits, and kept by a process of many runs."""

    def observe() -> _Seen:
        return _Seen(observe_weights(model, converted.plans), observe_inputs(model, images, converted.plans))

    if not afresh:
        return observe()
    # What stays in full precision is not observed.
    layers = [[name, *(bits < FULL_PRECISION for bits in plan.bits)] for name, plan in converted.plans.items()]
    what = {
        **depends_on(settings),
        "recipe": recipe_of(settings),
        "layers": layers,
        "target": None if settings.target is None else settings.target.plain,
        "channels_last": settings.fit.channels_last,
    }
    return cached("observed", what, observe, lambda seen: seen)  # only looked at


def correct_(settings: RunSettings, student: nn.Module, images: list[torch.Tensor], converted: Converted) -> None:
    """What makes up for rounding once the ranges are known: better choices of codes, then shifted biases."""
    q = settings.quantize
    if q.rounding is not None:
        rounding: Rounding = q.rounding.build()
        start = time.perf_counter()
        with as_config_error("quantize.rounding"):
            rounding(student, images, seed=settings.seed)
        log.info("rounded by %s in %.0f s", type(rounding).__name__, time.perf_counter() - start)
    if q.bias is not None:
        bias: BiasCorrection = q.bias.build()
        with as_config_error("quantize.bias"):
            bias(student, images, converted.statistics)


def convert(settings: RunSettings, model: nn.Module, example: torch.Tensor) -> Converted:
    """Fold, equalize and swap the layers of ``model`` in place by ``settings.quantize``; nothing is calibrated yet."""
    q = settings.quantize
    target = target_of(settings)
    asked = {kind: bits for kind, bits in vars(q.operations).items() if bits is not None}
    operations = asked if target is None else {**target.operations, **asked}
    merge_fused_biases(model)
    try:
        statistics = fold_batchnorm_(model, example) if q.fold == "before" else {}
        if q.equalize is not None:
            q.equalize.build()(model, example, statistics)
        expose_operations(model, {*operations, *([] if target is None else target.in_float)}, example, required=asked)
        found = find_layers(model, example)
        if not found.layers:
            reasons = "".join(f"; {name}: {reason}" for name, reason in list(found.skipped.items())[:REASONS])
            raise ValueError(f"{type(model).__name__} has no layer that can be quantized{reasons}")
        allocation: Allocation = q.bits.build()(found.weighted)
        operands = {
            name: LayerBits(FULL_PRECISION, operations.get(kind, FULL_PRECISION))
            for name, kind in found.operands.items()
        }
        if target is not None and target.sums == "shortcut":
            operands |= dict.fromkeys(readings(model, example).main & found.operands.keys(), IN_FLOAT)
        plans = plan_layers(found, {**allocation, **operands}, _recipe(settings), built(q.policies))
        swap_layers(model, found, plans, gradient=None if q.gradient is None else q.gradient.build())
        if target is not None:
            share_quantizers_(model, plans, readings(model, example).tensors)
        if q.fold == "training":
            fold_in_training_(model, example)
    except ConfigError:
        raise
    except ValueError as error:
        message = str(error)
        raise ConfigError(message if message.startswith("quantize.") else f"quantize: {message}") from error
    return Converted(plans, statistics, found.skipped)


def target_of(settings: RunSettings) -> Target | None:
    """The runtime that the student is for, if there is one."""
    target: Target | None = None if settings.target is None else settings.target.build()
    return target


def settle_for_target_(student: nn.Module) -> None:
    """Round what a target stores as whole numbers, at the end of training or calibration."""
    try:
        log.info("the biases of %d layers are whole numbers of the target's steps", len(round_biases_(student)))
    except ValueError as error:  # the lint has said which layer has no form there
        log.warning("biases are not rounded for the target: %s", error)


@contextmanager
def quiet_conversion() -> Iterator[None]:
    """Inside, conversion does not log what stays in full precision."""
    logger = logging.getLogger("qtrain.convert")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def rehearse(settings: RunSettings, data: VisionData) -> None:
    """Convert a model that nobody keeps, so that what cannot be quantized is said before hours of pretraining.

    Its inputs are calibrated on a black image, for an observer that does not suit, and the objective looks at its
    layers and at those of an untrained teacher.
    """
    if not settings.quantize.enabled:
        return
    model = build_model(settings.model, data.info)
    example = example_input(data.info)
    with quiet_conversion():  # what stays in full precision is said by the conversion that counts
        plans = convert(settings, model, example).plans
    with as_config_error("quantize.input"):
        calibrate_inputs(model, observe_inputs(model, [example], plans))
    layers_to_freeze(model, patterns=settings.fit.freeze.layers or ())
    chosen = settings.teacher.model
    teacher = None
    if chosen is not None and chosen.target is not None:
        teacher = of_members(chosen, lambda one: build_model(one, data.info))
    with as_config_error("objective"):
        build_objective(settings, model, teacher, data)


def _recipe(settings: RunSettings) -> LayerPlan:
    """What all layers get that no policy changes."""
    q = settings.quantize
    weight = q.weight.build()
    if q.weight_wrapper is not None:
        weight = _wrapped(q.weight_wrapper.build(), weight)
    return LayerPlan(
        weight=weight,
        input=q.input.build(),
        weight_observer=q.weight_observer.build(),
        input_observer=q.input_observer.build(),
    )


def _wrapped(wrapper: Callable[..., Quantizer], quantizer: MakeQuantizer) -> MakeQuantizer:
    """``quantizer`` inside ``wrapper``, whatever that would hold by its own config."""
    kind = getattr(wrapper, "func", None)
    if not (isinstance(kind, type) and issubclass(kind, Wrapper)):
        raise ConfigError(
            f"quantize.weight_wrapper: {getattr(kind, '__name__', wrapper)} holds no other quantizer; take "
            "quant_noise, oscillation or incremental, or set quantize.weight itself"
        )
    return partial(wrapper, quantizer=quantizer)
