"""A straight line between two moments, flat before and after."""

from typing import final

from qtrain.schedules.base import Schedule, check_fraction


@final
class Linear(Schedule):
    """``start`` until progress ``begin``, then in a straight line to ``end`` at progress ``finish``."""

    def __init__(self, *, start: float, end: float, begin: float = 0.0, finish: float = 1.0) -> None:
        check_fraction("Linear", "begin", begin)
        check_fraction("Linear", "finish", finish)
        if begin >= finish:
            raise ValueError(f"Linear: begin must come before finish, got begin={begin}, finish={finish}")
        self.start, self.end, self.begin, self.finish = start, end, begin, finish

    def __call__(self, progress: float) -> float:
        along = min(max((progress - self.begin) / (self.finish - self.begin), 0.0), 1.0)
        return self.start + (self.end - self.start) * along
