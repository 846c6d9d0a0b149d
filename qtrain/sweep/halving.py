"""Successive halving by several objectives: who of those that came to a rung goes on."""

from collections.abc import Sequence
from typing import final

from qtrain.sweep.pareto import ranked


@final
class ParetoHalving:
    """Rungs at ``grace``, ``grace * reduction``, ... below ``last``, and what each trial had when it came there.

    A trial stops at a rung if its place among all that came so far, itself included, is not within the first
    ``1 / reduction`` of them; the first to come always goes on.
    """

    def __init__(self, *, grace: float, reduction: float, last: float) -> None:
        self._reduction = reduction
        self._rungs: list[tuple[float, dict[str, Sequence[float]]]] = []
        while grace < last:
            self._rungs.append((grace, {}))
            grace *= reduction

    def goes_on(self, id: str, time: float, losses: Sequence[float]) -> bool:
        """Trial ``id`` has come to ``time`` with ``losses``, of which less is better. To be told in order of time."""
        for milestone, seen in reversed(self._rungs):
            if time >= milestone:
                if id in seen:
                    return True
                seen[id] = losses
                place = ranked([*seen.values()]).index(len(seen) - 1)
                return place < len(seen) / self._reduction
        return True
