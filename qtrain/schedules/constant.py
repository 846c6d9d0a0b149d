"""A number that does not change."""

from typing import final

from qtrain.schedules.base import Schedule


@final
class Constant(Schedule):
    """``value`` at all times."""

    def __init__(self, *, value: float) -> None:
        self.value = value

    def __call__(self, progress: float) -> float:
        return self.value
