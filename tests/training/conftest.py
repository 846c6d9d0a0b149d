"""Fixtures for what runs around a step: a few images, a small quantized student, and a fit of three steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from qtrain.nn import QuantConv, QuantLinear
from qtrain.observers.min_max import MinMax
from qtrain.quantizers.uniform.lsq import LSQ
from qtrain.spec import Batch, PerTensor, QuantSpec
from qtrain.training.checkpoint import AtomicCheckpointIO


class Plain(pl.LightningModule):
    """Labels alone and plain gradient descent; ``teacher_logits`` as a module with a teacher leaves them."""

    def __init__(self, student: nn.Module, lr: float) -> None:
        super().__init__()
        self.student = student
        self.lr = lr
        self.teacher_logits: Tensor | None = None

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.student(batch.image), batch.target)

    def configure_optimizers(self) -> Any:
        learning = [parameter for parameter in self.student.parameters() if parameter.requires_grad]
        return torch.optim.SGD(learning, lr=self.lr, momentum=0.9, weight_decay=1e-2)


def calibrated(x: Tensor, bits: int, *, weight: bool) -> LSQ:
    quantizer = LSQ(spec=QuantSpec(bits=bits, shape=tuple(x.shape) if weight else ()), init="range")
    observer = MinMax(granularity=PerTensor())
    observer.update(x.detach())
    quantizer.calibrate_(observer.observed(bits))
    return quantizer


@pytest.fixture
def images() -> Tensor:
    """Twelve images (12, 1, 4, 4)."""
    return torch.randn(12, 1, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def make_student(images: Tensor) -> Callable[..., nn.Sequential]:
    """``make_student(bits=4)``: a convolution ("0") and a linear layer ("5"), batch norm and dropout in between."""

    def make(bits: int = 4) -> nn.Sequential:
        torch.manual_seed(0)
        conv, linear = QuantConv(source=nn.Conv2d(1, 2, 3)), QuantLinear(source=nn.Linear(8, 3))
        conv.weight_quantizer = calibrated(conv.weight, bits, weight=True)
        conv.input_quantizer = calibrated(images, bits, weight=False)
        linear.weight_quantizer = calibrated(linear.weight, bits, weight=True)
        return nn.Sequential(conv, nn.BatchNorm2d(2), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), linear)

    return make


@pytest.fixture
def fit_three_steps(images: Tensor) -> Callable[..., Plain]:
    """``fit_three_steps(student, callbacks, lr=0.1, **trainer_options)``: an epoch of three batches of four."""

    def fit(student: nn.Module, callbacks: Sequence[pl.Callback] = (), lr: float = 0.1, **options: Any) -> Plain:
        batches = [Batch(part, torch.arange(4) % 3, torch.arange(4)) for part in images.split(4)]
        torch.manual_seed(1)
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=1,
            logger=False,
            callbacks=list(callbacks),
            plugins=[AtomicCheckpointIO()],
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=any(isinstance(callback, pl.callbacks.Checkpoint) for callback in callbacks),
            **options,
        )
        module = Plain(student, lr)
        trainer.fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
        return module

    return fit
