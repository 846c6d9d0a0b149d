"""The loss on the labels."""

from typing import final

from torch import Tensor

from qtrain.distillation.base import Term
from qtrain.functional.losses import hard_loss
from qtrain.schedules.base import Schedule
from qtrain.spec import StepOutputs


@final
class Hard(Term):
    """Cross-entropy with the labels; ``label_smoothing`` spreads that share of each label over all classes."""

    def __init__(self, *, weight: float | Schedule = 1.0, label_smoothing: float = 0.0) -> None:
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"Hard: label_smoothing must be in [0, 1), got {label_smoothing}")
        super().__init__(weight=weight)
        self.label_smoothing = label_smoothing

    def forward(self, outputs: StepOutputs) -> Tensor:
        return hard_loss(outputs.logits, outputs.target, self.label_smoothing)
