"""From a full-precision model to a quantized student.

The one place that says in which order a student is made: merge batch norm, equalize, find the layers, give them bits,
swap them, calibrate, learn how to round, correct biases. Loading comes before, fitting after.
"""

import copy
import logging
import time
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from qtrain.convert.calibrate import calibrate_inputs, calibrate_weights, observe_inputs, observe_weights
from qtrain.convert.freeze import layers_to_freeze
from qtrain.convert.inherit import StudentState, inherit_quantizers_, inherit_weights_
from qtrain.convert.switch import switch_bits_
from qtrain.data.base import VisionData
from qtrain.deployment.lint import lint, summary
from qtrain.deployment.onnx.biases import round_biases_
from qtrain.deployment.onnx.scales import settle_gates_, settle_tops_
from qtrain.observers.base import Observer
from qtrain.pipeline.allocate import with_found_bits
from qtrain.pipeline.build_model import build_model, example_input
from qtrain.pipeline.build_teacher import build_objective
from qtrain.pipeline.conversion import Converted, convert, quiet_conversion, target_of
from qtrain.pipeline.load_data import depends_on, recipe_of
from qtrain.pipeline.many_bits import joined, settings_by_width
from qtrain.pipeline.memory_format import settle_memory_format_
from qtrain.pipeline.pretrain import of_members
from qtrain.pipeline.run_cache import cached
from qtrain.ptq.bias_correction import BiasCorrection
from qtrain.ptq.calibrate_from_bn import calibrate_from_statistics
from qtrain.ptq.rounding.base import Rounding
from qtrain.settings.run_settings import RunSettings
from qtrain.spec import FULL_PRECISION, Allocation
from qtrain.utils.errors import as_config_error

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """A student ready to fit; ``allocation`` is empty where it stays in full precision."""

    student: nn.Module
    allocation: Allocation


def prepare_student(
    settings: RunSettings, model: nn.Module, data: VisionData, student_state: StudentState | None = None
) -> Prepared:
    """Convert and calibrate ``model`` in place by ``settings.quantize``, on the CPU or wherever the model is.

    Then rounding is learned and biases are corrected, where the config asks for it. With the ``student_state`` of an
    earlier stage the weights are that stage's, and so are quantizers of the same kind; where bits differ, their scales
    are fitted to the new ones. With ``settings.many_bits.widths`` that is done for each width to a copy of ``model``,
    and the student has all of them; the allocation is that of the widest.
    """
    settle_memory_format_(settings, model, data)
    if alone := settings_by_width(settings):
        made = {bits: prepare_student(own, copy.deepcopy(model), data) for bits, own in alone.items()}
        students = {bits: prepared.student for bits, prepared in made.items()}
        return Prepared(joined(students), made[max(made)].allocation)
    settings = with_found_bits(settings, model, data)
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
            example = example_input(data.info).to(next(model.parameters()).device)
            found = lint(model, target, example, converted.skipped)
            log.info("%s; task=lint lists all", summary(found, model, target))
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
    exact = None
    if q.rounding is not None:
        exact = copy.deepcopy(student) if q.bias is not None else None
        rounding: Rounding = q.rounding.build()
        start = time.perf_counter()
        with as_config_error("quantize.rounding"):
            rounding(student, images, seed=settings.seed)
        log.info("rounded by %s in %.0f s", type(rounding).__name__, time.perf_counter() - start)
    if q.bias is not None:
        bias: BiasCorrection = q.bias.build()
        with as_config_error("quantize.bias"):
            bias(student, images, converted.statistics, exact=exact)


def settle_for_target_(student: nn.Module) -> None:
    """Move scales and biases to what a target computes with integers, at the end of training or calibration."""
    if tops := settle_tops_(student):
        log.info("the top codes of %d layers' inputs are where their activation ends: %s", len(tops), ", ".join(tops))
    gates, others = settle_gates_(student)
    if gates:
        log.info("3 is a whole number of steps of what %d hard sigmoids and hard swishes read", len(gates))
    if others:
        log.info("hard sigmoids and hard swishes stay in floating point by their ranges: %s", ", ".join(others))
    try:
        log.info("the biases of %d layers are whole numbers of the target's steps", len(round_biases_(student)))
    except ValueError as error:  # the lint has said which layer has no form there
        log.warning("biases are not rounded for the target: %s", error)


def rehearse(settings: RunSettings, data: VisionData) -> None:
    """Convert a model that nobody keeps, so that what cannot be quantized is said before hours of pretraining.

    Its inputs are calibrated on a black image, for an observer that does not suit, and the objective looks at its
    layers and at those of an untrained teacher.
    """
    if not settings.quantize.enabled:
        return
    if alone := settings_by_width(settings):
        for own in alone.values():
            rehearse(own, data)
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
