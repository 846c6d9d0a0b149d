"""Allocations within the budgets, made of any: lowered where they cost too much, and raised where there is room."""

from collections.abc import Sequence
from typing import final

import numpy as np

from qtrain.allocate.problem import ROUNDING, Floats, Group, Problem, chosen
from qtrain.spec import Allocation

Picks = tuple[int, ...]
"""The number of the option that each group has."""


@final
class Feasible:
    """The choices of a problem as numbers, with what makes any of them fit its budgets.

    ``source`` draws the random numbers of all methods, so that the same seed gives the same answers.
    """

    def __init__(self, problem: Problem, source: np.random.Generator) -> None:
        self.problem, self.source = problem, source
        self.groups: Sequence[Group] = problem.groups()
        self._room = problem.room() + ROUNDING

    def allocation(self, picks: Picks) -> Allocation:
        """The bits of all layers for ``picks``."""
        return self.problem.ordered(chosen(self.groups, picks))

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
        """``picks`` with cheaper options for groups in random order until they fit, then dearer ones while they do.

        Raises ``ValueError`` where no order of lowering meets all budgets at once.
        """
        current = list(picks)
        total = self._total(current)
        order = [int(i) for i in self.source.permutation(len(current))]
        while (total > self._room).any():
            worst = int((total - self._room).argmax())
            lower = next(((g, o) for g in order if (o := self._lowered(current, g, worst)) is not None), None)
            if lower is None:
                names = " and ".join(f"budgets.{name}" for name in self.problem.budgets)
                raise ValueError(f"{names}: no allocation was found that meets all of them; relax one")
            group, current[group] = lower
            order.append(order.pop(order.index(group)))
            total = self._total(current)
        for group in order:
            while (raised := self._raised(current, group, total)) is not None:
                current[group] = raised
                total = self._total(current)
        return tuple(current)

    def _lowered(self, current: list[int], group: int, metric: int) -> int | None:
        """The option of ``group`` with fewer bits that costs a little less of ``metric``; ``None`` if there is none."""
        own = self.groups[group]
        now, costs = own.options[current[group]], own.costs[metric]
        below = [
            o
            for o, bits in enumerate(own.options)
            if bits.weight <= now.weight and bits.input <= now.input and costs[o] < costs[current[group]]
        ]
        return max(below, key=lambda o: costs[o]) if below else None

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
