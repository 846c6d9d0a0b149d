"""From a full-precision model to one with quantizers, by a run's settings; nothing is calibrated yet."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from qtrain.convert.fold import OutputStatistics, fold_batchnorm_, fold_in_training_
from qtrain.convert.layers import Quantizable, find_layers
from qtrain.convert.operations import expose_operations
from qtrain.convert.plan import IN_FLOAT, LayerPlan, plan_layers
from qtrain.convert.swap import swap_layers
from qtrain.convert.target import Target
from qtrain.convert.tensors import readings, share_quantizers_
from qtrain.models.layer_kinds import merge_fused_biases
from qtrain.quantizers.base import MakeQuantizer, Quantizer
from qtrain.quantizers.wrappers.wrapper import Wrapper
from qtrain.settings.component import built
from qtrain.settings.run_settings import RunSettings
from qtrain.spec import FULL_PRECISION, Allocation, LayerBits
from qtrain.utils.errors import ConfigError

REASONS = 2
"""So many layers are named where none can be quantized."""


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


class Ready(NamedTuple):
    """A model whose layers can be given bits: the layers, the bits of operands between them, merged batch norms."""

    found: Quantizable
    operands: Allocation
    statistics: dict[str, OutputStatistics]


def make_ready_(settings: RunSettings, model: nn.Module, example: torch.Tensor) -> Ready:
    """Fold and equalize ``model`` in place, expose its operations and find its layers, by ``settings.quantize``.

    Raises ``ValueError`` where it has no layer that can be quantized.
    """
    q, target = settings.quantize, target_of(settings)
    asked = {kind: bits for kind, bits in vars(q.operations).items() if bits is not None}
    operations = asked if target is None else {**target.operations, **asked}
    merge_fused_biases(model)
    statistics = fold_batchnorm_(model, example) if q.fold == "before" else {}
    if q.equalize is not None:
        q.equalize.build()(model, example, statistics)
    expose_operations(model, {*operations, *([] if target is None else target.in_float)}, example, required=asked)
    found = find_layers(model, example)
    if not found.layers:
        reasons = "".join(f"; {name}: {reason}" for name, reason in list(found.skipped.items())[:REASONS])
        raise ValueError(f"{type(model).__name__} has no layer that can be quantized{reasons}")
    operands = {
        name: LayerBits(FULL_PRECISION, operations.get(kind, FULL_PRECISION)) for name, kind in found.operands.items()
    }
    if target is not None and target.sums == "shortcut":
        operands |= dict.fromkeys(readings(model, example).main & found.operands.keys(), IN_FLOAT)
    return Ready(found, operands, statistics)


def convert(settings: RunSettings, model: nn.Module, example: torch.Tensor) -> Converted:
    """Fold, equalize and swap the layers of ``model`` in place by ``settings.quantize``; nothing is calibrated yet."""
    q = settings.quantize
    with as_conversion_error():
        found, operands, statistics = make_ready_(settings, model, example)
        allocation: Allocation = q.bits.build()(found.weighted)
        plans = plan_layers(found, {**allocation, **operands}, layer_recipe(settings), built(q.policies))
        swap_layers(model, found, plans, gradient=None if q.gradient is None else q.gradient.build())
        if settings.target is not None:
            share_quantizers_(model, plans, readings(model, example).tensors)
        if q.fold == "training":
            fold_in_training_(model, example)
    return Converted(plans, statistics, found.skipped)


@contextmanager
def as_conversion_error() -> Iterator[None]:
    """Inside, a ``ValueError`` becomes a ``ConfigError`` about the section ``quantize``."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        message = str(error)
        raise ConfigError(message if message.startswith("quantize.") else f"quantize: {message}") from error


def target_of(settings: RunSettings) -> Target | None:
    """The runtime that the student is for, if there is one."""
    target: Target | None = None if settings.target is None else settings.target.build()
    return target


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


def layer_recipe(settings: RunSettings) -> LayerPlan:
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
