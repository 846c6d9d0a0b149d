"""The exponential moving average of the student's weights, which is often more accurate than the weights.

This callback averages floating tensors, copies the others, and copies the average into the model in ``on_fit_end``,
which is always called. Lightning's ``EMAWeightAveraging`` is not used for two reasons. It averages integer buffers too
and rounds down: 4 bits become ``0.999 * 4 + 0.001 * 4``, which is 3.9999998 in float32 and is stored as 3. And it
copies the average in ``on_train_end``, which Lightning does not call for a run that was killed after its last epoch and
resumed.
"""

from collections.abc import Iterable
from typing import Any, final

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from qtrain.training.student import student_of


def ema_decay(*, step: int, decay: float, warmup: bool) -> float:
    """Decay after ``step`` updates: ``min(decay, (1 + step) / (10 + step))`` with ``warmup``.

    Without it the random start would be forgotten only over ``1 / (1 - decay)`` steps.
    """
    return min(decay, (1 + step) / (10 + step)) if warmup else decay


@final
class WeightAverage(pl.Callback):
    """After each optimizer step ``average <- decay * average + (1 - decay) * weights``.

    Validation uses the average; training and the model part of a checkpoint use the weights themselves. At the end of a
    fit the student gets the average. Parameters and floating buffers (running statistics, scales) are averaged, in 32
    bits at least.
    """

    def __init__(self, *, decay: float = 0.999, warmup: bool = True) -> None:
        super().__init__()
        if not 0 < decay < 1:
            raise ValueError(f"WeightAverage: decay must be in (0, 1), got {decay}; leave weight_average null for none")
        self.decay = decay
        self.warmup = warmup
        self.average: dict[str, Tensor] = {}
        self._updates = 0
        self._seen_step = 0
        self._kept: dict[str, Tensor] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        tensors = _tensors(student_of(pl_module))
        if not self.average:
            self.average = {name: _wide(tensor.detach()).clone() for name, tensor in tensors.items()}
            self._seen_step = trainer.global_step
        else:  # restored from a checkpoint, on the CPU
            self.average = {name: _wide(self.average[name]).to(tensor.device) for name, tensor in tensors.items()}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._seen_step:
            return  # gradients are still being accumulated
        self._seen_step = trainer.global_step
        self._updates += 1
        self._update(student_of(pl_module), ema_decay(step=self._updates, decay=self.decay, warmup=self.warmup))

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._swap(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._swap(trainer, pl_module)

    @torch.no_grad()
    def restart_(self, student: nn.Module, modules: Iterable[nn.Module]) -> None:
        """Restart the averages of the tensors in ``modules``, which are parts of ``student``, at their current values.

        For values that jumped to another scale: the mean of old and new values would be meaningless.
        """
        jumped = {id(tensor) for module in modules for tensor in _tensors(module).values()}
        for name, tensor in _tensors(student).items():
            if id(tensor) in jumped and name in self.average:
                self.average[name].copy_(tensor)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.average:
            with torch.no_grad():
                for name, tensor in _tensors(student_of(pl_module)).items():
                    tensor.copy_(self.average[name])

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average, "updates": self._updates, "seen_step": self._seen_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.average = dict(state_dict["average"])
        self._updates = int(state_dict["updates"])
        self._seen_step = int(state_dict["seen_step"])

    @torch.no_grad()
    def _update(self, student: nn.Module, decay: float) -> None:
        tensors = _tensors(student)
        floating = [name for name, tensor in tensors.items() if tensor.is_floating_point()]
        others = [name for name in tensors if name not in set(floating)]
        average = get_ema_multi_avg_fn(decay)
        average([self.average[n] for n in floating], [_wide(tensors[n].detach()) for n in floating], self._updates)
        for name in others:
            self.average[name].copy_(tensors[name])

    @torch.no_grad()
    def _swap(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # In place, since compiled graphs and the optimizer refer to these tensors.
        if trainer.state.fn != "fit" or not self.average:
            return
        tensors = _tensors(student_of(pl_module))
        kept, self._kept = self._kept, {}
        if not kept:
            self._kept = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            tensor.copy_((kept or self.average)[name])


def _wide(tensor: Tensor) -> Tensor:
    """``tensor``, in 32 bits where it has 16, which do not hold the small steps of an average."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _tensors(student: nn.Module) -> dict[str, Tensor]:
    return {**dict(student.named_parameters()), **dict(student.named_buffers())}
