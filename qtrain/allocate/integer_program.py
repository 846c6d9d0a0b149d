"""The best allocation under budgets by integer programming, for scores that add up (HAWQ-v3, arXiv 2011.10680)."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, final

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp

from qtrain.allocate.base import Search
from qtrain.allocate.problem import ROUNDING, Floats, Group, Problem, chosen
from qtrain.convert.bank import ROLES
from qtrain.spec import Allocation, Choice, Scores
from qtrain.utils.checks import check_range

log = logging.getLogger(__name__)

TIGHTER = (0.0, 1e-7, 1e-6, 1e-5, 1e-4)
"""Parts of a budget that are kept back, one after the other, until rounding in the solver exceeds it no more."""

UNITS = 6
"""Most units that scores are counted in, one after the other."""

FINE = 1e-2
"""An answer below this part of the unit is within reach of the solver's tolerances, 1e-6 and 1e-7."""

TIME_LIMIT = 1
"""``status`` of a solver that was stopped."""


@final
@dataclass(frozen=True, kw_only=True)
class IntegerProgram(Search):
    """``min sum_i score[i, o_i]`` with ``sum_i cost[m, i, o_i] <= budget[m]`` for all budgets, one option each layer.

    HiGHS by branch and bound (``scipy.optimize.milp``) stops at a relative ``gap`` to the best possible, or after
    ``time_limit_s`` seconds with the best so far, which is logged. Options that fit no budget, or are no better than
    another one in any respect, are left out first. Scores count from the least of each layer, in units of the answer,
    since the solver's tolerances are absolute ones. Pairs of choices (CLADO) become variables of their own. Layers
    whose options have the very same score then get the most bits that the budgets leave room for, by a second program
    over these options alone.
    """

    gap: float = 1e-4
    time_limit_s: float = 30.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("IntegerProgram", "[0, inf)", gap=self.gap)
        check_range("IntegerProgram", "(0, inf)", time_limit_s=self.time_limit_s)

    def search(self, problem: Problem) -> Allocation:
        """The allocation of the least score. Raises ``ValueError`` where no allocation meets all budgets at once."""
        groups = _affordable(problem.groups(), problem.room())
        kept = [_without_dominated(group, keep_all=bool(problem.scores.pairs)) for group in groups]
        program = _Program.of(kept, problem)
        if (found := self._best(program, problem)) is None:
            raise ValueError(_why_not(problem, program, self))
        equal = list(_equal(groups, found, problem))
        if any(len(group.options) > 1 for group in equal):
            found = self._best(_Program.of(equal, replace(problem, scores=Scores({}, {}))), problem) or found
        return found

    def _best(self, program: "_Program", problem: Problem) -> Allocation | None:
        """The allocation of the least score of ``program`` that fits, ``None`` where there is none."""
        for kept_back in TIGHTER:
            found = self._solve(program, problem.room() - kept_back)
            if found.x is None:
                return None
            allocation = problem.ordered(chosen(program.groups, program.picks(found.x)))
            if problem.fits(allocation):
                return allocation
        return None

    def _solve(self, program: "_Program", room: Floats) -> OptimizeResult:
        """The solver's answer in units of its own score: it is asked again until these units are the right ones."""
        scores, upper = program.scores, np.ones(len(program.scores))
        unit = float(np.abs(scores).max(initial=0.0))
        for _ in range(UNITS):
            found = self._milp(program, room, scores / (unit or 1.0), upper)
            reached = 0.0 if found.x is None else float(scores @ np.round(found.x))
            if found.status == TIME_LIMIT or not 0 < reached < FINE * unit:
                break
            unit = reached
            if program.products is None:  # all scores are 0 or more, so what alone is worse is part of no better answer
                upper = np.where(scores > reached, 0.0, upper)
                scores = np.minimum(scores, reached)
        if found.status == TIME_LIMIT:
            log.warning("the integer program stopped after %g s, before it was within its gap", self.time_limit_s)
        return found

    def _milp(self, program: "_Program", room: Floats, scores: Floats, upper: Floats) -> OptimizeResult:
        constraints = [LinearConstraint(program.one_each, 1, 1)]
        if len(room):
            constraints.append(LinearConstraint(program.costs, -np.inf, room))
        if program.products is not None:
            constraints.append(LinearConstraint(program.products, program.products_low, np.inf))
        return milp(
            scores,
            constraints=constraints,
            integrality=program.whole,
            bounds=Bounds(0, upper),
            options={"mip_rel_gap": self.gap, "time_limit": self.time_limit_s},
        )


class _Program(NamedTuple):
    """Variables are the options of all groups in a row, then the products of pairs.

    ``scores`` count from the least of each group.
    """

    groups: Sequence[Group]
    scores: Floats
    one_each: sparse.csr_array
    costs: sparse.csr_array
    whole: Floats
    products: sparse.csr_array | None
    products_low: Floats

    @classmethod
    def of(cls, groups: Sequence[Group], problem: Problem) -> "_Program":
        sizes = [len(group.options) for group in groups]
        starts = np.concatenate([[0], np.cumsum(sizes)]).astype(int)
        pairs = list(_pairs(groups, starts, problem))
        options, count = int(starts[-1]), int(starts[-1]) + len(pairs)
        above = [group.scores - group.scores.min() for group in groups]
        scores = np.concatenate([*above, [value for *_, value in pairs]])
        one_each = sparse.lil_array((len(groups), count))
        for row, (start, size) in enumerate(zip(starts, sizes, strict=False)):
            one_each[row, start : start + size] = 1
        costs = np.concatenate(
            [*(group.costs for group in groups), np.zeros((len(problem.budgets), len(pairs)))], axis=1
        )
        products = sparse.lil_array((3 * len(pairs), count))
        low = np.zeros(3 * len(pairs))
        for number, (left, right, _) in enumerate(pairs):
            # y = a b for two numbers that are 0 or 1: y <= a, y <= b, y >= a + b - 1.
            own, row = options + number, 3 * number
            for side, places in enumerate((left, right)):
                products[row + side, places] = 1
                products[row + side, own] = -1
                products[row + 2, places] = -1
            products[row + 2, own] = 1
            low[row + 2] = -1
        whole = np.concatenate([np.ones(options), np.zeros(len(pairs))])
        return cls(
            groups, scores, one_each.tocsr(), sparse.csr_array(costs), whole, products.tocsr() if pairs else None, low
        )

    def picks(self, x: Floats) -> list[int]:
        """The option that each group got."""
        parts = np.split(x[: int(self.whole.sum())], np.cumsum([len(group.options) for group in self.groups])[:-1])
        return [int(part.argmax()) for part in parts]


def _pairs(groups: Sequence[Group], starts: Floats, problem: Problem) -> Iterator[tuple[list[int], list[int], float]]:
    """The variables of which one must be 1 for each side of a pair, and what the pair adds."""

    def places(choice: Choice) -> list[int]:
        return [
            int(start) + number
            for start, group in zip(starts, groups, strict=False)
            if choice.layer in group.layers
            for number, bits in enumerate(group.options)
            if getattr(bits, choice.role) == choice.bits
        ]

    for (left, right), value in problem.scores.pairs.items():
        if value and (a := places(left)) and (b := places(right)):
            yield a, b, value


def _affordable(groups: Sequence[Group], room: Floats) -> list[Group]:
    """``groups`` without options that exceed a budget even where all other groups have their cheapest one.

    The solver, which rounds, might take such an option for one that fits. Where nothing fits, all stay.
    """
    kept = list(groups)
    while True:
        cheapest = [group.costs.min(axis=1) for group in kept]
        others = np.sum(cheapest, axis=0) if cheapest else np.zeros(len(room))
        fitting = [
            ((others - least)[:, None] + group.costs <= room[:, None] + ROUNDING).all(axis=0)
            for group, least in zip(kept, cheapest, strict=True)
        ]
        if not all(fits.any() for fits in fitting):
            return list(groups)
        if all(fits.all() for fits in fitting):
            return kept
        kept = [_only(group, np.flatnonzero(fits)) for group, fits in zip(kept, fitting, strict=True)]


def _only(group: Group, options: Sequence[int] | NDArray[np.int64]) -> Group:
    """``group`` with some of its options."""
    return Group(group.layers, tuple(group.options[i] for i in options), group.scores[options], group.costs[:, options])


def _without_dominated(group: Group, *, keep_all: bool) -> Group:
    """``group`` without options that another one equals or beats in score and in every cost."""
    if keep_all:
        return group
    numbers = np.concatenate([group.scores[None], group.costs])
    kept: list[int] = []
    for option in np.lexsort((*numbers[1:], numbers[0])):
        if not any((numbers[:, other] <= numbers[:, option]).all() for other in kept):
            kept.append(int(option))
    return _only(group, sorted(kept))


def _equal(groups: Sequence[Group], found: Allocation, problem: Problem) -> Iterator[Group]:
    """Options that equal those of ``found`` in the score and are in no pair; their scores are bits to be had."""
    paired = {choice for pair, value in problem.scores.pairs.items() if value for choice in pair}

    def matters(group: Group, option: int) -> tuple[float, list[Choice]]:
        own = [
            choice
            for layer in group.layers
            for choice in (Choice(layer, role, getattr(group.options[option], role)) for role in ROLES)
            if choice in paired
        ]
        return float(group.scores[option]), own

    for group in groups:
        mine = matters(group, group.options.index(found[group.layers[0]]))
        same = [option for option in range(len(group.options)) if matters(group, option) == mine]
        yield replace(_only(group, same), scores=-group.bits[same])


def _why_not(problem: Problem, program: _Program, solver: IntegerProgram) -> str:
    """How far the nearest allocation is from all budgets: the least t for which each cost is at most t budgets."""
    fixed = 1 - problem.room()
    count = len(program.scores)
    costs = sparse.hstack([program.costs, -np.ones((len(fixed), 1))])
    found = milp(
        np.concatenate([np.zeros(count), [1.0]]),
        constraints=[
            LinearConstraint(sparse.hstack([program.one_each, np.zeros((len(program.groups), 1))]), 1, 1),
            LinearConstraint(costs, -np.inf, -fixed),
        ],
        integrality=np.concatenate([program.whole, [0.0]]),
        bounds=Bounds(0, np.concatenate([np.ones(count), [np.inf]])),
        options={"time_limit": solver.time_limit_s},
    )
    names = " and ".join(f"budgets.{name}" for name in problem.budgets)
    if found.x is None or found.x[-1] <= 1:
        limit = f"{solver.time_limit_s:g} s"
        return f"{names}: the integer program found no allocation in {limit}; relax one, or raise its time_limit_s"
    allocation = chosen(program.groups, program.picks(found.x))
    nearest = ", ".join(f"{problem.costs[n].total(allocation):,.6g} {problem.costs[n].unit}" for n in problem.budgets)
    return f"{names}: cannot be met together; the nearest allocation costs {nearest}"
