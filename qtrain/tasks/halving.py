"""A search in rungs, of which each has fewer candidates and gives them more.

Successive halving, the inner loop of Hyperband (Li et al. 2018, arXiv 1603.06560, algorithm 1).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple


class Score(NamedTuple):
    """On validation images: accuracy in percent, and the loss in nats, which decides between equals."""

    top1: float
    loss: float

    @property
    def order(self) -> tuple[float, float]:
        """What sorts the best first."""
        return (-self.top1, self.loss)


def rung_epochs(epochs: int, rungs: int, keep: float) -> list[int]:
    """Epochs of each rung: a share ``keep`` of the candidates gets ``1 / keep`` times as many as all had before.

    >>> rung_epochs(1, 3, 0.5)
    [1, 2, 4]
    """
    return [round(epochs / keep**rung) for rung in range(rungs)]


def best(scores: Mapping[str, Score], keep: float, spared: str | None = None) -> list[str]:
    """The best ``keep`` of the candidates, at least one, best first; of equals those that stand first.

    ``spared`` stays whatever its score, and counts for none: the candidate that the others have to beat.
    """
    ranked = sorted((name for name in scores if name != spared), key=lambda name: scores[name].order)
    kept = ranked[: max(1, int(keep * len(ranked)))]
    return [*kept, *([spared] if spared in scores else [])]  # type: ignore[list-item]


def search(
    candidates: Sequence[str],
    measure: Callable[[str, int], Score],
    *,
    epochs: Sequence[int],
    keep: float,
    spared: str | None = None,
) -> list[dict[str, Score]]:
    """The scores of each rung; ``measure(candidate, epochs)`` trains one. The winner is the best of the last rung."""
    rungs: list[dict[str, Score]] = []
    going = list(candidates)
    for given in epochs:
        rungs.append({name: measure(name, given) for name in going})
        going = best(rungs[-1], keep, spared)
    return rungs
