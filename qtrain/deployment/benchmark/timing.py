"""Times of several networks that take turns, so that what else the machine does meets all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> "Spread":
        """Raises ``ValueError`` for fewer than two values, which have no quartiles."""
        if len(values) < 2:
            raise ValueError(f"quartiles need at least 2 values, got {len(values)}")
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return Spread(median, low, high)

    def __mul__(self, factor: float) -> "Spread":
        return Spread(self.median * factor, self.low * factor, self.high * factor)


Times = Mapping[str, Sequence[float]]
"""By the network's name, the seconds of each round."""


def in_turns(
    calls: Mapping[str, Callable[[], object]], *, rounds: int, clock: Callable[[], float] = time.perf_counter
) -> Times:
    """The seconds that each of ``calls`` takes in each of ``rounds``.

    In a round each is called twice, and the second call counts: the first brings its weights back to the caches, from
    which the others have driven them. Each round begins with another one.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            calls[name]()
            start = clock()
            calls[name]()
            times[name].append(clock() - start)
    return times


def ratio(times: Times, one: str, other: str) -> Spread:
    """How many times as long ``one`` takes as ``other``, round by round; below 1 it is the faster one."""
    return Spread.of([a / b for a, b in zip(times[one], times[other], strict=True)])
