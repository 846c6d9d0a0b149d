"""Plateaus: the classic division of a learning rate at milestones."""

from collections.abc import Sequence
from typing import final

from qtrain.schedules.base import Schedule, check_fraction


@final
class Step(Schedule):
    """``start``, multiplied by ``factor`` at each milestone that progress has reached.

    >>> lr = Step(milestones=[0.5, 0.75], factor=0.1)
    >>> lr(0.49), lr(0.5), round(lr(0.75), 6)
    (1.0, 0.1, 0.01)
    """

    def __init__(self, *, milestones: Sequence[float], factor: float, start: float = 1.0) -> None:
        for milestone in milestones:
            check_fraction("Step", "a milestone", milestone)
        self.milestones = tuple(sorted(milestones))
        self.factor, self.start = factor, start

    def __call__(self, progress: float) -> float:
        return self.start * self.factor ** sum(progress >= m for m in self.milestones)
