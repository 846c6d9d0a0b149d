"""How much one optimizer step changes each layer's output, because its weights were rounded to other codes.

PROFIT (Park and Yoo 2020, arXiv 2008.04693) calls this the activation instability induced by weight quantization, and
freezes the layers with most of it; see :mod:`qtrain.convert.freeze`.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from qtrain.convert.layers import switched_off
from qtrain.models.sharding import whole_weights
from qtrain.nn import QuantEmbedding, QuantLinear, QuantWeighted
from qtrain.nn.base import input_of
from qtrain.tracking.metric_log import MetricLog
from qtrain.training.student import student_of
from qtrain.utils.calls import see_input
from qtrain.utils.checks import check_range
from qtrain.utils.eval_mode import evaluating

SMALLEST_VARIANCE_SHARE = 1e-5
"""Variances are at least this share of the layer's mean variance, so that a dead channel is not infinite."""


def gaussian_divergence(mean: Tensor, variance: Tensor, other_mean: Tensor, other_variance: Tensor) -> Tensor:
    """``KL(N(m0, v0) || N(m1, v1)) = 1/2 (ln(v1 / v0) + (v0 + (m0 - m1)^2) / v1 - 1)``, element by element, in nats."""
    moved = (variance + (mean - other_mean).square()) / other_variance
    return 0.5 * ((other_variance / variance).log() + moved - 1)


@dataclass(frozen=True)
class LayerMoments:
    """A layer's quantized input, and mean and variance of each channel of its output."""

    input: Tensor
    mean: Tensor
    variance: Tensor


@torch.no_grad()
def layer_moments(student: nn.Module, image: Tensor) -> dict[str, LayerMoments]:
    """Inputs and moments of each layer of ``student`` with a learned and quantized weight, for ``image`` (N, C, H, W).

    There is one forward in eval mode, which does not change the model. If a layer is called several times, its first
    call counts.
    """
    seen: dict[str, LayerMoments] = {}

    def before(name: str, layer: Any, x: Tensor) -> None:
        if name not in seen:
            quantized = input_of(layer, x)
            seen[name] = LayerMoments(quantized, *_moments(layer, quantized))

    layers = dict(_measured_layers(student))
    with ExitStack() as hooks, evaluating(student), torch.compiler.set_stance("force_eager"):
        for name, layer in layers.items():
            hooks.enter_context(see_input(layer, partial(before, name, layer)))
        if layers:
            student(image)
    return seen


@torch.no_grad()
def instability(student: nn.Module, seen: dict[str, LayerMoments]) -> Tensor:
    """``D^l`` of each layer in ``seen``, (layers,) float64: the mean divergence of the layer's output channels.

    It is that between the channel's output in ``seen`` and now, both as Gaussians over samples and positions. The
    paper's metric (§3) also models a channel by its mean and variance, and compares the weights before and after a step
    on the same input. Here this is the layer's quantized input from before the step, so that a layer's metric does not
    contain changes of the layers before it.
    """
    found = []
    with evaluating(student), torch.compiler.set_stance("force_eager"):
        for name, before in seen.items():
            mean, variance = _moments(student.get_submodule(name), before.input)
            floor = SMALLEST_VARIANCE_SHARE * before.variance.mean() + torch.finfo(torch.float64).tiny
            v0, v1 = before.variance.clamp(min=floor), variance.clamp(min=floor)
            found.append(gaussian_divergence(before.mean, v0, mean, v1).mean())
    return torch.stack(found) if found else torch.zeros(0, dtype=torch.float64)


@final
class Instability(pl.Callback):
    """Measures :func:`instability` around every ``every_n_steps``-th optimizer step, on up to ``images`` of its batch.

    :meth:`metrics` returns the means of the measurements so far; they go to ``metric_log`` as
    ``train/instability/<layer>``. Frozen layers are not measured, so measure in one stage and freeze in later stages.
    The running sums are in the resume point.
    """

    def __init__(self, *, metric_log: MetricLog, every_n_steps: int = 20, images: int = 64) -> None:
        super().__init__()
        check_range("Instability", "[1, inf)", every_n_steps=every_n_steps, images=images)
        self.metric_log = metric_log
        self.every_n_steps = every_n_steps
        self.images = images
        self._sums: dict[str, float] = {}
        self._count = 0
        self._seen: dict[str, LayerMoments] | None = None
        self._step = -1

    def metrics(self) -> dict[str, float]:
        """Mean instability so far, layer name -> nats; empty before the first measurement."""
        return {name: total / self._count for name, total in self._sums.items()}

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        accumulating = (batch_idx + 1) % trainer.accumulate_grad_batches != 0
        if (trainer.global_step + 1) % self.every_n_steps == 0 and not accumulating:
            self._step = trainer.global_step
            self._seen = layer_moments(student_of(pl_module), batch[0][: self.images])

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        seen, self._seen = self._seen, None
        if not seen or trainer.global_step == self._step:
            return
        student = student_of(pl_module)
        with whole_weights(student):
            measured = trainer.strategy.reduce(instability(student, seen), reduce_op="mean")
        assert isinstance(measured, Tensor)
        self._count += 1
        for name, value in zip(seen, measured.tolist(), strict=True):
            self._sums[name] = self._sums.get(name, 0.0) + value
        self.metric_log.write(trainer, {f"train/instability/{name}": value for name, value in self.metrics().items()})

    def state_dict(self) -> dict[str, Any]:
        return {"sums": dict(self._sums), "count": self._count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._sums = {str(name): float(total) for name, total in state_dict["sums"].items()}
        self._count = int(state_dict["count"])


def _measured_layers(student: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, layer in student.named_modules():
        if not isinstance(layer, QuantWeighted) or not layer.weight.requires_grad:
            continue
        if layer.weight_quantizer is not None and layer.weight_quantizer.enabled:
            yield name, layer


def _moments(layer: Any, quantized: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each output channel of ``layer`` for an already quantized input; float64."""
    with switched_off([layer.input_quantizer]):
        output: Tensor = type(layer).forward(layer, quantized)  # not __call__, which would call the hook again
    channels = -1 if isinstance(layer, QuantLinear | QuantEmbedding) else 1
    rows = output.double().movedim(channels, 0).flatten(1)
    return rows.mean(dim=1), rows.var(dim=1, unbiased=False)
