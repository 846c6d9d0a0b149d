"""Bits that change during training: 8, then 4, then 3, then 2.

The quantizers keep their bits in buffers, so a switch needs no recompilation, and a resumed run restores them. A switch
adapts the ranges (:mod:`qtrain.convert.switch`), the optimizer's moments and the weight average.
"""

import copy
import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, final

import pytorch_lightning as pl
import torch
from torch import Tensor, nn, optim

from qtrain.convert.layers import quant_layers
from qtrain.convert.plan import MakeObserver
from qtrain.convert.switch import calibrate_at_, switch_bits_
from qtrain.models.sharding import whole_weights
from qtrain.observers.squared_error import SquaredError
from qtrain.quantizers.base import Quantizer
from qtrain.schedules.base import Schedule
from qtrain.spec import FULL_PRECISION, LayerBits
from qtrain.tracking.metric_log import MetricLog
from qtrain.training.callbacks.average import WeightAverage
from qtrain.training.student import student_of
from qtrain.utils.errors import errors_of
from qtrain.utils.suggestions import close_matches

log = logging.getLogger(__name__)

FIRST_MOMENTS = ("momentum_buffer", "exp_avg", "grad_avg")
SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq", "square_avg")
"""The names of averages of a gradient, and of its square, in the state of torch's optimizers."""

_CHECKED = 1000


@torch.no_grad()
def rescale_moments_(optimizers: Iterable[optim.Optimizer], factors: Mapping[nn.Parameter, Tensor]) -> None:
    """Multiply the moments of each parameter in ``factors`` by its factor, in place, in all ``optimizers``.

    A parameter that becomes ``f p`` has the gradient ``g / f`` (:class:`qtrain.quantizers.hooks.Rescalable`). Averages
    of the gradient are multiplied by the factor, those of its square by the factor squared. So Adam's step, the ratio
    of the two, is as large as before the switch, and SGD's step is divided by ``f`` as its gradient is. LSQ's own
    gradient factor also depends on the bits; its effect on the averages fades with the old gradients.
    """
    for optimizer in optimizers:
        for parameter, factor in factors.items():
            for name, value in optimizer.state.get(parameter, {}).items():
                if not isinstance(value, Tensor) or value.shape != parameter.shape:
                    continue
                if name in FIRST_MOMENTS:
                    value.mul_(factor)
                elif name in SECOND_MOMENTS:
                    value.mul_(factor.square())


@final
class BitSchedule(pl.Callback):
    """Before each step, every quantizer has ``max(round(schedule(progress)), its allocation's bits)`` bits.

    So the schedules ``weight`` and ``input``, which are for all layers, end at the allocation. Layers with more bits in
    the allocation (usually the first and the last) keep them. ``layers`` maps name patterns to other schedules,
    ``{pattern: {weight: ..., input: ...}}``; if several match, the last one wins. Bits do not change where the schedule
    is ``None`` or there is no quantizer.

    A switch keeps the quantized values; for inputs those of the first ``images`` of the current batch. A run that
    starts above its allocation first calibrates with ``observer``. Rows ``train/bits/<layer>.weight`` and ``.input`` go
    to ``metric_log`` at each switch. Raises ``ValueError`` at the start of a fit for a pattern that matches no layer,
    and for scheduled bits that a quantizer cannot have.
    """

    def __init__(
        self,
        *,
        metric_log: MetricLog,
        weight: Schedule | None = None,
        input: Schedule | None = None,
        layers: Mapping[str, Mapping[str, Schedule]] | None = None,
        observer: MakeObserver = SquaredError,
        images: int = 16,
    ) -> None:
        super().__init__()
        if images < 1:
            raise ValueError(f"BitSchedule: images must be at least 1, got {images}; 16 are usual")
        for pattern, given in (layers or {}).items():
            if wrong := set(given) - {"weight", "input"}:
                raise ValueError(
                    f"BitSchedule: layers.{pattern} may give weight and input, got {', '.join(sorted(wrong))}"
                )
        if weight is None and input is None and not layers:
            raise ValueError("BitSchedule: schedules nothing; give weight, input or layers")
        self.metric_log, self.observer, self.images = metric_log, observer, images
        self.everywhere = {"weight": weight, "input": input}
        self.layers = dict(layers or {})
        self._planned: dict[str, dict[str, tuple[Schedule, int]]] = {}
        self._bits: dict[str, LayerBits] = {}
        self._total_steps = 1

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._plan(student_of(pl_module))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Read once, so that later steps need not ask the device. A resumed run has them from its checkpoint.
        self._bits = {name: _widths(layer) for name, layer in quant_layers(student_of(pl_module)).items()}
        self._total_steps = max(1, int(trainer.estimated_stepping_batches))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        asked = self.bits_at(trainer.global_step / self._total_steps)
        changed = {name: bits for name, bits in asked.items() if bits != self._bits[name]}
        if not changed:
            return
        student = student_of(pl_module)
        images = batch[0][: self.images]
        if trainer.world_size > 1:  # all ranks must compute the same ranges
            images = trainer.strategy.broadcast(images)
        with whole_weights(student):
            if trainer.global_step == 0:  # nothing is learned yet, so there is nothing to keep
                above = {name: LayerBits(*map(max, bits, self._bits[name])) for name, bits in changed.items()}
                calibrate_at_(student, above, images, self.observer)
            factors = switch_bits_(student, changed, images)
        rescale_moments_(trainer.optimizers, factors)
        touched = [quantizer for name in changed for quantizer in _quantizers(student.get_submodule(name)).values()]
        for callback in trainer.callbacks:  # type: ignore[attr-defined] # every trainer has them
            if isinstance(callback, WeightAverage):
                callback.restart_(student, touched)
        self._report(trainer, changed)
        self._bits.update(changed)

    def bits_at(self, progress: float) -> dict[str, LayerBits]:
        """The bits of every scheduled layer at ``progress``."""
        bits = {}
        for name, planned in self._planned.items():
            widths = {role: max(round(schedule(progress)), least) for role, (schedule, least) in planned.items()}
            bits[name] = self._bits[name]._replace(**widths)
        return bits

    def _plan(self, student: nn.Module) -> None:
        """Find each quantizer's schedule and final bits, and check that it can have all scheduled bits."""
        layers = quant_layers(student)
        for pattern in self.layers:
            if not any(fnmatchcase(name, pattern) for name in layers):
                close = close_matches(pattern, layers)
                raise ValueError(f"BitSchedule: pattern {pattern!r} matches no quantized layer{close}")
        self._planned = {}
        for name, layer in layers.items():
            planned = {}
            for role, quantizer in _quantizers(layer).items():
                if (schedule := self._schedule(name, role)) is not None:
                    planned[role] = schedule, quantizer.spec.bits
                    _check_widths(name, quantizer, schedule)
            if planned:
                self._planned[name] = planned

    def _schedule(self, name: str, role: str) -> Schedule | None:
        found = self.everywhere[role]
        for pattern, given in self.layers.items():
            if fnmatchcase(name, pattern):
                found = given.get(role, found)
        return found

    def _report(self, trainer: pl.Trainer, changed: Mapping[str, LayerBits]) -> None:
        moves: Counter[str] = Counter()
        row = {}
        for name, bits in changed.items():
            for role, old, new in zip(LayerBits._fields, self._bits[name], bits, strict=True):
                if old != new:
                    moves[f"{role} {old} -> {new} bits"] += 1
                    row[f"train/bits/{name}.{role}"] = float(new)
        what = ", ".join(f"{move} in {count} layer{'s' * (count > 1)}" for move, count in moves.items())
        log.info("step %d: %s", trainer.global_step, what)
        self.metric_log.write(trainer, row)


def _quantizers(layer: Any) -> dict[str, Quantizer]:
    found = {"weight": layer.weight_quantizer, "input": layer.input_quantizer}
    return {role: quantizer for role, quantizer in found.items() if quantizer is not None}


def _widths(layer: Any) -> LayerBits:
    present = {role: int(quantizer.bits) for role, quantizer in _quantizers(layer).items()}
    return LayerBits(weight=present.get("weight", FULL_PRECISION), input=present.get("input", FULL_PRECISION))


def _check_widths(name: str, quantizer: Quantizer, schedule: Schedule) -> None:
    trial = copy.deepcopy(quantizer)
    for bits in sorted({max(round(schedule(i / _CHECKED)), quantizer.spec.bits) for i in range(_CHECKED + 1)}):
        with errors_of(f"BitSchedule: layer {name!r}"):
            trial.set_range_(bits=bits, signed=bool(trial.signed))
