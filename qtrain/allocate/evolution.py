"""Bits by evolution, with a predictor that chooses which children are worth measuring (after APQ, arXiv 2006.08509)."""

import logging
import math
from dataclasses import dataclass
from typing import final

import numpy as np
from sklearn.linear_model import BayesianRidge

from qtrain.allocate.base import Search
from qtrain.allocate.feasible import Feasible, Picks
from qtrain.allocate.integer_program import IntegerProgram
from qtrain.allocate.problem import Floats, Problem
from qtrain.spec import Allocation, LayerBits
from qtrain.utils.checks import check_range

log = logging.getLogger(__name__)


@final
@dataclass(frozen=True, kw_only=True)
class Evolution(Search):
    """The loss of whole allocations is measured, ``population`` of them in each of ``generations``.

    The first population has the uniform reference, the allocation of the least score, and random ones. Each later one
    has children of the best half, made by crossing and by mutation (each option is drawn anew with probability
    ``change``). Of ``children`` the predictor lets those be measured that it expects to be best: a linear regression of
    the logarithm of the loss on which option each layer has. The answer is the best that was measured.
    """

    generations: int = 10
    population: int = 24
    children: int = 400
    change: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("Evolution", "[1, inf)", generations=self.generations, children=self.children)
        check_range("Evolution", "[4, inf)", population=self.population)
        check_range("Evolution", "(0, 1]", change=self.change)

    def search(self, problem: Problem) -> Allocation:
        """The best allocation that was measured, all of them within the budgets.

        Raises ``ValueError`` where no allocation meets all budgets, and where no loss is finite.
        """
        feasible = Feasible(problem, np.random.default_rng(problem.seed))
        losses = feasible.losses
        given = [self._nearest(feasible, self.reference(list(problem.options)))]
        if problem.scores.weight or problem.scores.input:
            given.append(self._nearest(feasible, IntegerProgram().search(problem)))
        wanted = [*given, *(feasible.draw() for _ in range(self.population - len(given)))]
        for generation in range(self.generations):
            for picks in wanted:
                feasible.loss(picks)
            least = losses[feasible.best()]
            log.info("generation %d of %d: least loss %.4f of %d", generation + 1, self.generations, least, len(losses))
            wanted = self._promising(feasible)
        return feasible.allocation(feasible.best())

    def _nearest(self, feasible: Feasible, allocation: Allocation) -> Picks:
        """``allocation``, as near to it as the options have it, made to fit."""

        def near(layer: str, options: tuple[LayerBits, ...]) -> int:
            wanted = allocation[layer]
            return min(
                range(len(options)),
                key=lambda o: abs(options[o].weight - wanted.weight) + abs(options[o].input - wanted.input),
            )

        return feasible.repaired(tuple(near(group.layers[0], group.options) for group in feasible.groups))

    def _promising(self, feasible: Feasible) -> list[Picks]:
        """Children of the best half of a population that are not measured yet, and expected to be good."""
        source, losses = feasible.source, feasible.losses
        parents = sorted(losses, key=losses.__getitem__)[: self.population // 2]
        made: dict[Picks, None] = {}
        for number in range(self.children):
            mother = parents[int(source.integers(len(parents)))]
            if number % 2:
                father = parents[int(source.integers(len(parents)))]
                child = feasible.mutated(feasible.crossed(mother, father), change=self.change)
            else:
                child = feasible.mutated(mother, change=self.change)
            if child not in losses:
                made[child] = None
        if not made:
            return []
        known = [picks for picks, loss in losses.items() if math.isfinite(loss)]
        predictor = BayesianRidge().fit(
            _one_hot(feasible, known), np.log(np.maximum([losses[picks] for picks in known], 1e-12))
        )
        expected = predictor.predict(_one_hot(feasible, list(made)))
        return [list(made)[place] for place in np.argsort(expected, kind="stable")[: self.population]]


def _one_hot(feasible: Feasible, rows: list[Picks]) -> Floats:
    """Which option each group has, (rows, all options): 1 where it is the chosen one."""
    sizes = np.array([len(group.options) for group in feasible.groups])
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    encoded = np.zeros((len(rows), int(sizes.sum())))
    for row, picks in enumerate(rows):
        encoded[row, starts + np.array(picks)] = 1
    return encoded
