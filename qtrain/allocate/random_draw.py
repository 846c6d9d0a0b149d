"""Bits by chance within the budgets: what every search has to beat."""

from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np

from qtrain.allocate.base import Search
from qtrain.allocate.feasible import Feasible
from qtrain.allocate.problem import Problem
from qtrain.spec import Allocation


@final
@dataclass(frozen=True, kw_only=True)
class RandomDraw(Search):
    """One allocation drawn at random, lowered until it fits the budgets and raised while it does; by the run's seed."""

    needs_scores: ClassVar[bool] = False

    def search(self, problem: Problem) -> Allocation:
        """A random allocation within the budgets of ``problem``."""
        feasible = Feasible(problem, np.random.default_rng(problem.seed))
        return feasible.allocation(feasible.draw())
