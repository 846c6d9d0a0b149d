"""All best allocations between the cheapest and the best, by dynamic programming (ZeroQ, arXiv 2001.00281)."""

from bisect import bisect_right
from dataclasses import dataclass
from typing import NamedTuple, final

import numpy as np
from numpy.typing import NDArray

from qtrain.allocate.base import Search
from qtrain.allocate.problem import ROUNDING, Floats, Problem, chosen
from qtrain.spec import Allocation
from qtrain.utils.checks import check_range

BLOCK = 256
"""Points that are compared with all at a time."""


class Point(NamedTuple):
    """An allocation of the front: its score, and what it costs in the units of the budgets, by metric."""

    score: float
    costs: dict[str, float]
    allocation: Allocation


@final
@dataclass(frozen=True, kw_only=True)
class Pareto(Search):
    """The front of score against cost, layer by layer: of partial allocations only those stay that none beats.

    The front is exact as long as it has at most ``points`` partial allocations. Above that, the costs are divided into
    equal steps, as many by as many with two budgets, and the best of each stays; so a layer loses at most one step of
    each cost. The answer is the point of the least score within all budgets, and of equal scores the most bits. Pairs
    of layers are not considered.
    """

    points: int = 20_000

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("Pareto", "[2, inf)", points=self.points)

    def search(self, problem: Problem) -> Allocation:
        """The point of the front with the least score. Raises ``ValueError`` where no point meets all budgets."""
        return self.front(problem)[-1].allocation

    def front(self, problem: Problem) -> list[Point]:
        """All points within the budgets that none beats in score and every cost; the least score comes last.

        Of two points with the same score the one with more bits is the better one, even where it costs more.

        Raises ``ValueError`` for pairs of layers, and where no point meets all budgets.
        """
        if problem.scores.pairs:
            raise ValueError("Pareto: scores of pairs do not add up layer by layer; use allocate=integer_program")
        groups = problem.groups()
        room = problem.room()
        cheapest_rest = np.cumsum([g.costs.min(axis=1) for g in groups][::-1], axis=0)[::-1]
        scores, bits, costs = np.zeros(1), np.zeros(1), np.zeros((len(problem.budgets), 1))
        history: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
        for number, group in enumerate(groups):
            parents, options = np.divmod(np.arange(len(scores) * len(group.options)), len(group.options))
            new_scores = scores[parents] + group.scores[options]
            new_bits = bits[parents] + group.bits[options]
            new_costs = costs[:, parents] + group.costs[:, options]
            rest = cheapest_rest[number + 1] if number + 1 < len(groups) else np.zeros(len(room))
            kept = np.flatnonzero((new_costs + rest[:, None] <= room[:, None] + ROUNDING).all(axis=0))
            kept = kept[_undominated(new_scores[kept], new_bits[kept], new_costs[:, kept])]
            kept = kept[_thinned(new_scores[kept], new_bits[kept], new_costs[:, kept], self.points)]
            scores, bits, costs = new_scores[kept], new_bits[kept], new_costs[:, kept]
            history.append((parents[kept], options[kept]))
        ends = np.lexsort((bits, -scores)).tolist()
        found = [_point(problem, chosen(groups, _trace(history, end)), scores[end]) for end in ends]
        fitting = [point for point in found if problem.fits(point.allocation)]
        if fitting:
            return fitting
        # Here, since every training knows this module, and few need the solver.
        from qtrain.allocate.integer_program import IntegerProgram

        # It finds one that the thinned points have missed, or says how near one comes.
        found_after_all = IntegerProgram().search(problem)
        return [_point(problem, found_after_all, problem.scores.total(found_after_all))]


def _undominated(scores: Floats, bits: Floats, costs: Floats) -> NDArray[np.int64]:
    """The points that none beats or equals in the score, then the bits, and in every cost, in rising score."""
    order = np.lexsort((*costs[::-1], -bits, scores))
    if len(costs) <= 1:
        column = costs[0, order] if len(costs) else np.arange(len(order), dtype=float)
        best_before = np.concatenate([[np.inf], np.minimum.accumulate(column)[:-1]])
        return order[column < best_before]
    if len(order):
        order = order[~_beaten_by_far(costs[:, order])]
    first = _first_of_two if len(costs) == 2 else _first_of_many
    return order[first(costs[:, order])]


def _beaten_by_far(costs: Floats) -> NDArray[np.bool_]:
    """Whether an earlier one of the points (M, N) is in a cell of lower costs, all of them, on a grid of about N."""
    metrics, count = costs.shape
    each = int(count ** (1 / metrics)) + 1
    low, high = costs.min(axis=1, keepdims=True), costs.max(axis=1, keepdims=True)
    scaled = (costs - low) / np.where(high > low, high - low, 1.0) * each
    cells = tuple(np.minimum(scaled.astype(np.int64), each - 1))
    # The first point of all cells below one, in every cost; cells 0 have none below.
    first = np.full([each + 1] * metrics, count)
    np.minimum.at(first, tuple(cell + 1 for cell in cells), np.arange(count))
    for axis in range(metrics):
        first = np.minimum.accumulate(first, axis=axis)
    beaten: NDArray[np.bool_] = first[cells] < np.arange(count)
    return beaten


def _first_of_many(costs: Floats) -> NDArray[np.int64]:
    """The places of the points (M, N) that no earlier one equals or beats in all costs, by blocks of points."""
    kept = np.empty(0, dtype=np.int64)
    for start in range(0, costs.shape[1], BLOCK):
        block = np.arange(start, min(start + BLOCK, costs.shape[1]))
        block = block[~_covered(costs[:, kept], costs[:, block]).any(axis=0)]
        # What an earlier one of the block covers that is itself covered, the one that covers this one covers as well.
        own = np.triu(_covered(costs[:, block], costs[:, block]), k=1)
        kept = np.concatenate([kept, block[~own.any(axis=0)]])
    return kept


def _covered(by: Floats, points: Floats) -> NDArray[np.bool_]:
    """Whether each of ``by`` (M, F) costs no more than each of ``points`` (M, N) in any respect: (F, N)."""
    covered = np.ones((by.shape[1], points.shape[1]), dtype=bool)
    for one, other in zip(by, points, strict=True):
        covered &= one[:, None] <= other
    return covered


def _first_of_two(costs: Floats) -> NDArray[np.int64]:
    """The places of the points (2, N) that no earlier one equals or beats in both costs.

    ``left`` and ``right`` are a staircase: what is best so far, by rising first and falling second cost.
    """
    left: list[float] = []
    right: list[float] = []
    kept = []
    for place, (one, other) in enumerate(costs.T.tolist()):
        at = bisect_right(left, one)
        if at and right[at - 1] <= other:
            continue
        kept.append(place)
        end = at
        while end < len(left) and right[end] >= other:
            end += 1
        # One of equal first cost lies just before, and its second cost is higher.
        begin = at - 1 if at and left[at - 1] == one else at
        left[begin:end], right[begin:end] = [one], [other]
    return np.array(kept, dtype=np.int64)


def _thinned(scores: Floats, bits: Floats, costs: Floats, points: int) -> NDArray[np.int64]:
    """At most ``points`` of the points: the best score in each of as many equal steps of the costs."""
    if len(scores) <= points:
        return np.arange(len(scores))
    spread = costs.max(axis=1) - costs.min(axis=1)
    differing = costs[spread > 0]
    steps = np.zeros(len(scores), dtype=np.int64)
    each = max(int(points ** (1 / max(len(differing), 1)) + 1e-9), 1)
    for cost in differing:
        place = ((cost - cost.min()) / (cost.max() - cost.min()) * each).astype(np.int64)
        steps = steps * each + np.minimum(place, each - 1)
    order = np.lexsort((-bits, scores, steps))
    return np.sort(order[np.unique(steps[order], return_index=True)[1]])


def _trace(history: list[tuple[NDArray[np.int64], NDArray[np.int64]]], end: int) -> list[int]:
    picks = []
    for parents, options in reversed(history):
        picks.append(int(options[end]))
        end = int(parents[end])
    return picks[::-1]


def _point(problem: Problem, allocation: Allocation, score: float) -> Point:
    ordered = problem.ordered(allocation)
    return Point(float(score), {name: problem.costs[name].total(ordered) for name in problem.budgets}, ordered)
