"""Gradient inundation: scales gradients so that integer weights change, for fine-tuning on synthetic images.

With a small learning rate most weights never leave their rounding interval, so the integers of a calibrated model
hardly change. Therefore AIT (Choi et al. 2022, arXiv 2203.17008, §4.2) scales the gradient of each layer at every step
so that a given share of its integers changes. The other half of AIT is the loss, the divergence from the teacher
without labels: ``objective=kl``.
"""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, final

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from qtrain.functional.order_statistic import kth_magnitude
from qtrain.models.sharding import is_sharded
from qtrain.nn import QuantConv, QuantConvTranspose, QuantWeighted
from qtrain.nn.conv_transpose import outputs_first
from qtrain.quantizers.base import Quantizer
from qtrain.quantizers.hooks import EvenSteps, Rate, checked_share, rate_at
from qtrain.quantizers.wrappers.wrapper import TrainingWrapper
from qtrain.tracking.metric_log import MetricLog
from qtrain.training.student import student_of

log = logging.getLogger(__name__)

MARGIN = 2.0**-10
"""A move goes this many steps beyond the rounding threshold; more for large codes, where float32 is less exact."""


@dataclass(frozen=True)
class IntegerGrid:
    """The grid of a weight's quantizer: multiples of ``step``, from ``low`` to ``high`` steps."""

    step: Tensor
    low: Tensor
    high: Tensor

    def position(self, weight: Tensor) -> Tensor:
        """``weight`` in steps, float32."""
        return weight.detach().float() / self.step

    def codes(self, weight: Tensor) -> Tensor:
        """``round(clamp(weight / step, low, high))``, float32."""
        return self.position(weight).clamp(self.low, self.high).round()


def needed_factors(weight: Tensor, gradient: Tensor, grid: IntegerGrid, lr: float) -> Tensor:
    """The least factors ``f``, of the shape of ``weight``, with which ``w - lr f g`` has another code than ``w``.

    With ``t = w / s`` and ``c`` its code, moving up needs ``f = (c + 1/2 - t) s / (lr |g|)``, moving down
    ``(t - c + 1/2) s / (lr |g|)``; infinite where the gradient is zero or points out of the code range.
    """
    position, codes = grid.position(weight), grid.codes(weight)
    up = gradient < 0
    reach = 0.5 + MARGIN + 4 * torch.finfo(torch.float32).eps * codes.abs()
    threshold = torch.where(up, codes + reach, codes - reach)
    pace = lr * gradient.detach().float().abs() / grid.step
    needed = (threshold - position).abs() / pace
    return torch.where(torch.where(up, codes >= grid.high, codes <= grid.low), torch.inf, needed)


def inundation(needed: Tensor, count: int) -> Tensor:
    """The factor, 0-dim and at least 1, with which ``count`` of the weights change their code.

    This is the ``count``-th smallest of ``needed``, or the largest finite one if fewer weights can change.
    """
    farthest = torch.where(needed.isfinite(), needed, 0.0).max()
    return kth_magnitude(needed, count).minimum(farthest).clamp(min=1.0)


@final
class GradientInundation(pl.Callback):
    """Before each optimizer step, multiplies the gradient of every quantized weight by :func:`inundation`'s factor.

    So a plain gradient step changes at least ``share`` of a layer's integers (with momentum or decay, the step is a
    different one). ``share`` is a number or a schedule of progress; the count for each layer is rounded up. With 0 the
    gradients are not changed. Biases, norms and learned scales keep their gradients.

    Every ``every_n_steps`` steps, two metrics of that step under ``train/inundation/`` go to ``metric_log``: ``moved``,
    the percentage of all integers that changed, and ``factor``, the largest one of all layers. The factors are a
    function of weights, gradients and progress, so there is no state to resume.

    Weights keep their gradients, and are logged, if their codes are not evenly spaced or they are standardized before
    they are multiplied. Raises ``ValueError`` if no weight is left, if the optimizer is not SGD (others divide by the
    size of the gradient, which cancels the factor), and if gradients are clipped, which cancels it too.
    """

    def __init__(self, *, metric_log: MetricLog, share: Rate = 0.001, every_n_steps: int = 20) -> None:
        super().__init__()
        if every_n_steps < 1:
            raise ValueError(f"GradientInundation: every_n_steps must be at least 1, got {every_n_steps}")
        self.metric_log = metric_log
        self.share = checked_share("GradientInundation", "share", share)
        self.every_n_steps = every_n_steps
        self._total_steps = 1
        self._layers: dict[str, QuantWeighted] = {}
        self._rates: dict[Tensor, dict[str, Any]] = {}
        self._before: dict[str, Tensor] = {}
        self._largest: Tensor | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if is_sharded(student_of(pl_module)):
            raise ValueError("GradientInundation: needs whole gradients on each process; set fit.shard=false")
        self._total_steps = max(1, int(trainer.estimated_stepping_batches))
        self._layers = dict(_moved_layers(student_of(pl_module)))
        if trainer.gradient_clip_val:
            raise ValueError(
                "GradientInundation: gradients are clipped after it has made them grow; set fit.clip_norm=null"
            )
        for optimizer in trainer.optimizers:
            if not isinstance(optimizer, torch.optim.SGD):
                raise ValueError(
                    f"GradientInundation: {type(optimizer).__name__} divides by the gradient's size, so that a larger "
                    "one moves nothing more; take optimizer=sgd"
                )
            for group in optimizer.param_groups:
                self._rates.update(dict.fromkeys(group["params"], group))

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        step = trainer.global_step
        share = rate_at(self.share, step / self._total_steps)
        checked_share("GradientInundation", "share", share)  # the value of a schedule is known only now
        measure = (step + 1) % self.every_n_steps == 0
        factors = []
        for name, layer in self._layers.items():
            gradient = layer.weight.grad
            if gradient is None:
                continue
            grid, weight = _grid(layer), layer.effective_weight()
            if measure:
                self._before[name] = grid.codes(weight)
            if (count := math.ceil(share * weight.numel())) > 0:
                needed = needed_factors(weight, _as_multiplied(layer, gradient), grid, self._rates[layer.weight]["lr"])
                factors.append(inundation(needed, count))
                gradient.mul_(factors[-1])
        if measure and factors:
            self._largest = torch.stack(factors).max()

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        before, self._before = self._before, {}
        largest, self._largest = self._largest, None
        if not before:
            return
        layers = {name: self._layers[name] for name in before}
        moved = [(_grid(layer).codes(layer.effective_weight()) != before[name]) for name, layer in layers.items()]
        share = torch.stack([part.sum() for part in moved]).sum() / sum(part.numel() for part in moved)
        row = {"train/inundation/moved": 100 * float(share)}
        if largest is not None:
            row["train/inundation/factor"] = float(largest)
        self.metric_log.write(trainer, row)


def _moved_layers(student: nn.Module) -> Iterator[tuple[str, QuantWeighted]]:
    """The layers whose integers can change by their gradient; the others are logged."""
    found = False
    for name, layer in student.named_modules():
        if not isinstance(layer, QuantWeighted) or not layer.weight.requires_grad:
            continue
        if layer.weight_quantizer is None or not layer.weight_quantizer.enabled:
            continue
        if (why := _why_not(layer)) is None:
            found = True
            yield name, layer
        else:
            log.info("gradient inundation leaves out %s: %s", name, why)
    if not found:
        raise ValueError(
            "GradientInundation: no weight that learns has evenly spaced codes; "
            "take quantizer@quantize.weight=lsq, lsq_plus or affine"
        )


def _why_not(layer: QuantWeighted) -> str | None:
    core = _core(layer)
    if not isinstance(core, EvenSteps):
        return f"codes of {type(core).__name__} are not evenly spaced"
    if isinstance(layer, QuantConv) and layer.weight_transform is not None:
        return "its weight is standardized before it is multiplied"
    return None


def _core(layer: QuantWeighted) -> Quantizer:
    """The quantizer that rounds the weight in deployment."""
    quantizer = layer.weight_quantizer
    assert quantizer is not None
    while isinstance(quantizer, TrainingWrapper):
        quantizer = quantizer.inner
    return quantizer


def _grid(layer: QuantWeighted) -> IntegerGrid:
    core = _core(layer)
    assert isinstance(core, EvenSteps)
    weight = layer.effective_weight()
    low, high = core.code_low, core.code_high
    zero_point = getattr(core, "zero_point", None)
    if zero_point is not None:
        zero_point = core.spread(zero_point, weight)
        low, high = low - zero_point, high - zero_point
    return IntegerGrid(core.spread(core.step().detach(), weight), low, high)


def _as_multiplied(layer: QuantWeighted, gradient: Tensor) -> Tensor:
    """``gradient`` in the layout of the layer's effective weight."""
    return outputs_first(gradient, layer.groups) if isinstance(layer, QuantConvTranspose) else gradient
