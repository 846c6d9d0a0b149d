"""Allocations within the budgets, made of any: lowered where they cost too much, and raised where there is room.

Searches that measure whole allocations do it here, so that one whose loss is not finite is never the best.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import final

import numpy as np

from qtrain.allocate.integer_program import IntegerProgram
from qtrain.allocate.problem import ROUNDING, Floats, Group, Problem, chosen
from qtrain.spec import Allocation, Scores

Picks = tuple[int, ...]
"""The number of the option that each group has."""


@final
class Feasible:
    """The choices of a problem as numbers, with what makes any of them fit its budgets.

    ``source`` draws the random numbers of all methods, so that the same seed gives the same answers. ``losses`` are in
    nats, of the allocations that were measured, infinite where the loss is no finite number.
    """

    def __init__(self, problem: Problem, source: np.random.Generator) -> None:
        self.problem, self.source = problem, source
        self.groups: Sequence[Group] = problem.groups()
        self.losses: dict[Picks, float] = {}
        self._room = problem.room() + ROUNDING

    def allocation(self, picks: Picks) -> Allocation:
        """The bits of all layers for ``picks``."""
        return self.problem.ordered(chosen(self.groups, picks))

    def loss(self, picks: Picks) -> float:
        """The loss of ``picks``, in nats, measured when it is first asked for."""
        if picks not in self.losses:
            loss = self.problem.loss(self.allocation(picks))
            self.losses[picks] = loss if math.isfinite(loss) else math.inf
        return self.losses[picks]

    def best(self) -> Picks:
        """The allocation of the least loss that was measured. Raises ``ValueError`` where no loss is finite."""
        best = min(self.losses, key=self.losses.__getitem__)
        if math.isinf(self.losses[best]):
            raise ValueError("no loss that was measured is finite; start from other weights, or allow more bits")
        return best

    def draw(self) -> Picks:
        """Options drawn alike, then made to fit."""
        return self.repaired(tuple(int(self.source.integers(len(group.options))) for group in self.groups))

    def crossed(self, mother: Picks, father: Picks) -> Picks:
        """Each option of one of two parents, then made to fit."""
        coins = self.source.integers(2, size=len(mother))
        return self.repaired(tuple(m if coin else f for m, f, coin in zip(mother, father, coins, strict=True)))

    def mutated(self, picks: Picks, *, change: float) -> Picks:
        """Each option drawn anew with probability ``change``, one at least, then made to fit."""
        again = self.source.random(len(picks)) < change
        again[self.source.integers(len(picks))] = True
        new = [
            int(self.source.integers(len(group.options))) if anew else pick
            for pick, anew, group in zip(picks, again, self.groups, strict=True)
        ]
        return self.repaired(tuple(new))

    def repaired(self, picks: Picks) -> Picks:
        """``picks`` with cheaper options for groups in random order until they fit, then more bits while they do.

        Where that does not fit, the integer program finds one that does. Raises ``ValueError`` where none meets all
        budgets.
        """
        order = [int(i) for i in self.source.permutation(len(picks))]
        current = self._lowered(list(picks), order)
        total = self._total(current)
        for group in order:
            while (raised := self._raised(current, group, total)) is not None:
                current[group] = raised
                total = self._total(current)
        return tuple(current)

    def _lowered(self, current: list[int], order: list[int]) -> list[int]:
        """``current`` made to fit, by the groups in the ``order``, which is turned round meanwhile."""
        for _ in range(sum(len(group.options) for group in self.groups)):  # costs that fall with the bits may go round
            total = self._total(current)
            if (total <= self._room).all():
                return current
            worst = int((total - self._room).argmax())
            lower = next(((g, o) for g in order if (o := self._cheaper(current, g, worst)) is not None), None)
            if lower is None:
                break
            group, current[group] = lower
            order.append(order.pop(order.index(group)))
        return list(self._some)

    @cached_property
    def _some(self) -> Picks:
        """An allocation within the budgets, of many bits if there is room."""
        found = IntegerProgram().search(replace(self.problem, scores=Scores({}, {})))
        return tuple(group.options.index(found[group.layers[0]]) for group in self.groups)

    def _cheaper(self, current: list[int], group: int, metric: int) -> int | None:
        """The option of ``group`` that costs a little less of ``metric``; ``None`` if there is none.

        It has fewer bits, unless only more bits are cheaper, as where a machine has no kernel for few bits.
        """
        own = self.groups[group]
        now, costs = own.options[current[group]], own.costs[metric]
        below = [o for o in range(len(own.options)) if costs[o] < costs[current[group]]]
        fewer = [o for o in below if own.options[o].weight <= now.weight and own.options[o].input <= now.input]
        return max(fewer or below, key=lambda o: costs[o], default=None)

    def _raised(self, current: list[int], group: int, total: Floats) -> int | None:
        """An option of ``group`` with more bits that still fits, the least step up; ``None`` where there is none."""
        own = self.groups[group]
        now = own.options[current[group]]
        above = [
            o
            for o, bits in enumerate(own.options)
            if bits != now
            and bits.weight >= now.weight
            and bits.input >= now.input
            and (total + own.costs[:, o] - own.costs[:, current[group]] <= self._room).all()
        ]
        return min(above, key=lambda o: (sum(own.options[o]), self.source.random())) if above else None

    def _total(self, current: Sequence[int]) -> Floats:
        costs = [group.costs[:, pick] for group, pick in zip(self.groups, current, strict=True)]
        return np.sum(costs, axis=0) if costs else np.zeros(len(self._room))
