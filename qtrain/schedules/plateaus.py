"""Plateaus: one value after another, each held until the next milestone."""

from collections.abc import Sequence
from itertools import pairwise
from typing import final

from qtrain.schedules.base import Schedule, check_fraction


@final
class Plateaus(Schedule):
    """``values[i]`` from the i-th milestone on; before the first milestone ``values[0]``.

    ``milestones`` are one less than ``values``, rising shares of the run; ``None`` gives all values equal shares.

    >>> bits = Plateaus(values=[8, 4, 3, 2], milestones=[0.1, 0.3, 0.5])
    >>> bits(0.0), bits(0.1), bits(0.49), bits(1.0)
    (8.0, 4.0, 3.0, 2.0)
    """

    def __init__(self, *, values: Sequence[float], milestones: Sequence[float] | None = None) -> None:
        if not values:
            raise ValueError("Plateaus: values is empty; give at least one, for instance [8, 4, 3, 2]")
        if milestones is None:
            milestones = [i / len(values) for i in range(1, len(values))]
        for milestone in milestones:
            check_fraction("Plateaus", "a milestone", milestone)
        if len(milestones) != len(values) - 1:
            raise ValueError(
                f"Plateaus: {len(values)} values need {len(values) - 1} milestones between them, "
                f"got {len(milestones)}; or leave milestones null for equal shares"
            )
        if any(later <= earlier for earlier, later in pairwise(milestones)):
            raise ValueError(f"Plateaus: milestones must rise, got {list(milestones)}")
        self.values, self.milestones = tuple(values), tuple(milestones)

    def __call__(self, progress: float) -> float:
        return float(self.values[sum(progress >= milestone for milestone in self.milestones)])
