"""Bits by reinforcement learning: an agent goes through the layers and learns the loss at the end (HAQ, 1811.08886)."""

import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np
import torch

from qtrain.allocate.base import Search
from qtrain.allocate.feasible import Feasible
from qtrain.allocate.problem import Problem
from qtrain.spec import Allocation
from qtrain.utils.checks import check_range

log = logging.getLogger(__name__)


@final
@dataclass(frozen=True, kw_only=True)
class Reinforcement(Search):
    """DDPG, as in HAQ: at each layer the agent chooses widths of weight and input as two numbers between 0 and 1.

    It sees which layer it is, what the layer can cost at most, and what it chose before. At the end of an episode bits
    are lowered until all budgets are met, the loss is measured, and the reward is minus its logarithm. The first
    ``startup`` of ``episodes`` are random. The answer is the best allocation that was measured. Needs the extra ``rl``
    (stable-baselines3).
    """

    needs_scores: ClassVar[bool] = False

    episodes: int = 300
    startup: int = 60
    noise: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("Reinforcement", "[1, inf)", episodes=self.episodes, startup=self.startup)
        check_range("Reinforcement", "[0, inf)", noise=self.noise)

    def search(self, problem: Problem) -> Allocation:
        """The best allocation that an episode ended with.

        Raises ``ValueError`` where the extra is not installed, no allocation meets all budgets, or no loss is finite.
        """
        try:
            from qtrain.allocate.bit_episodes import learn
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("qtrain"):
                raise
            raise ValueError(f"Reinforcement: {error.name} is not installed; pip install 'qtrain[rl]'") from error
        feasible = Feasible(problem, np.random.default_rng(problem.seed))
        with _random_state_kept():
            learn(feasible, episodes=self.episodes, startup=self.startup, noise=self.noise, seed=problem.seed)
        best, losses = feasible.best(), feasible.losses
        log.info("least loss %.4f of %d allocations in %d episodes", losses[best], len(losses), self.episodes)
        return feasible.allocation(best)


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Inside, global random numbers are those of the agent; afterwards they go on as before."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
