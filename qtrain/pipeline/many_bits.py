"""A student of many bits, from its settings: each width is converted and calibrated as a student of its own."""

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from qtrain.convert.many_bits import join
from qtrain.data.base import VisionData
from qtrain.data.fit_data import FitData
from qtrain.distillation.objective import Objective
from qtrain.nn.many_bits import ManyBits, in_use, label
from qtrain.pipeline.allocate import is_search
from qtrain.pipeline.build_teacher import bind
from qtrain.pipeline.costs import costs
from qtrain.pipeline.summary import Figures
from qtrain.pipeline.tested import Tested
from qtrain.settings.run_settings import ManyBitsSettings, RunSettings
from qtrain.utils.errors import ConfigError, as_config_error

OF_ONE_WIDTH = ("BitSchedule", "Inundation", "Instability")
"""Callbacks that follow, or change, the codes of one student."""


def settings_by_width(settings: RunSettings) -> dict[int, RunSettings]:
    """The settings of a student of each width, the widest first; empty where ``many_bits.widths`` names none.

    A width takes the place of ``weight`` and ``input`` of ``quantize.bits``; what this gives to single layers, the
    first and the last for instance, counts at each width. Raises ``ConfigError`` for widths that are none, and for
    settings with which weights cannot be shared.
    """
    widths = settings.many_bits.widths
    if not widths:
        return {}
    if len(widths) < 2 or len(set(widths)) < len(widths) or not all(1 <= width <= 16 for width in widths):
        raise ConfigError(
            f"many_bits.widths: must be two or more different widths of 1..16 bits, got {list(widths)}; "
            "[8, 4, 2] for instance, or null for one width"
        )
    for key, remedy in _unfit(settings).items():
        raise ConfigError(f"{key}: does not go with many_bits.widths={list(widths)}; {remedy}")
    alone = ManyBitsSettings(objective=settings.many_bits.objective)
    chosen = settings.quantize.bits
    if not {"weight", "input"} <= chosen.options.keys():
        raise ConfigError(
            "quantize.bits: many_bits.widths take the place of its weight and input, which it has not; "
            "take allocate@quantize.bits=uniform"
        )
    return {
        width: replace(
            settings,
            many_bits=alone,
            quantize=replace(settings.quantize, bits=chosen.with_options(weight=width, input=width)),
        )
        for width in sorted(widths, reverse=True)
    }


def _unfit(settings: RunSettings) -> dict[str, str]:
    """The settings with which a student cannot have many bits, and what to do for each."""
    q = settings.quantize
    found = {
        "quantize.enabled": (not q.enabled, "leave it true"),
        "quantize.fold": (q.fold != "none", "each width has a batch norm of its own, so leave it none"),
        "quantize.rounding": (q.rounding is not None, "it moves the weights for one width, so leave it none"),
        "quantize.bias": (q.bias is not None, "it moves biases for one width, so leave it none"),
        "quantize.bits": (is_search(settings), "the widths are the bits, so take allocate@quantize.bits=uniform"),
        "target": (settings.target is not None, "train for a target with one width"),
        "stages": (bool(settings.stages), "train in one fit"),
        "teacher.learns": (settings.teacher.learns, "the widest student is the teacher of the others"),
        "fit.shard": (settings.fit.shard, "leave it false"),
    }
    unfit = {key: remedy for key, (wrong, remedy) in found.items() if wrong}
    for name, callback in settings.callbacks.items():
        if callback is not None and callback.kind in OF_ONE_WIDTH:
            unfit[f"callbacks.{name}"] = f"{callback.kind} follows the codes of one width, so take it away"
    return unfit


def joined(students: Mapping[int, nn.Module]) -> ManyBits:
    """:func:`qtrain.convert.many_bits.join`, with a ``ConfigError`` where the students cannot share their weights."""
    with as_config_error("many_bits"):
        return join(students)


def narrow_objective(settings: RunSettings, student: nn.Module, data: FitData) -> Objective | None:
    """The objective of the widths below the widest, whose teacher that is; ``None`` for a student of one width."""
    if not isinstance(student, ManyBits):
        return None
    if settings.many_bits.objective is None:
        raise ConfigError("many_bits.objective: the narrow widths need one; take objective@many_bits.objective=kl")
    objective: Objective = settings.many_bits.objective.build()
    widest = in_use(student)
    bind(settings, objective, widest, widest, data)
    return objective


def figures_by_width(settings: RunSettings, student: nn.Module, data: VisionData, tested: Tested) -> Figures:
    """What each width of a student of many bits costs alone, and its accuracies; empty for a student of one width.

    By :func:`~qtrain.nn.many_bits.label`, as ``w4``: fields of a summary.
    """
    if not isinstance(student, ManyBits):
        return {}
    figures = {}
    for bits, one in student.students.items():
        cost = costs(settings, one, data).as_dict()
        del cost["layers"]
        figures[label(bits)] = {"w_bits": bits, "a_bits": bits, **cost, **tested.of_width(bits)}
    return figures
