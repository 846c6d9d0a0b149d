"""A window: the part of another schedule between two shares of its progress."""

from typing import final

from qtrain.schedules.base import Schedule, check_fraction


@final
class Window(Schedule):
    """``schedule`` from its progress ``begin`` to its progress ``finish``, over the whole of this run.

    So a run that is written as several stages follows the schedule of the whole: the first of two halves has
    ``finish=0.5``, the second ``begin=0.5``.
    """

    def __init__(self, *, schedule: Schedule, begin: float = 0.0, finish: float = 1.0) -> None:
        check_fraction("Window", "begin", begin)
        check_fraction("Window", "finish", finish)
        if begin >= finish:
            raise ValueError(f"Window: begin must come before finish, got begin={begin}, finish={finish}")
        self.schedule, self.begin, self.finish = schedule, begin, finish

    def __call__(self, progress: float) -> float:
        return self.schedule(self.begin + (self.finish - self.begin) * progress)
