"""The loss on the teacher's softened outputs."""

from typing import final

import torch
from torch import Tensor

from qtrain.distillation.base import Term, as_schedule
from qtrain.functional.losses import soft_target_loss
from qtrain.schedules.base import Schedule
from qtrain.spec import StepOutputs


@final
class Soft(Term):
    """``T^2 KL(teacher || student)`` at ``temperature`` T (arXiv 1503.02531); T > 0 and may follow a schedule."""

    needs_teacher = True
    value: Tensor

    def __init__(self, *, weight: float | Schedule = 1.0, temperature: float | Schedule = 4.0) -> None:
        super().__init__(weight=weight)
        self.temperature = as_schedule(temperature)
        for percent in range(101):  # fail now, and not in the run's last hour
            if (value := self.temperature(percent / 100)) <= 0:
                raise ValueError(f"Soft: temperature must be positive, got {value} at progress {percent / 100:.2f}")
        self.register_buffer("value", torch.ones(()), persistent=False)
        self.set_progress_(0.0)

    def set_progress_(self, progress: float) -> None:
        self.value.fill_(self.temperature(progress))

    def forward(self, outputs: StepOutputs) -> Tensor:
        assert outputs.teacher_logits is not None
        return soft_target_loss(outputs.logits, outputs.teacher_logits, self.value)
