"""Bits by reinforcement learning: within the budgets, reproducible, better than chance."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from qtrain.allocate.problem import Group
from qtrain.allocate.random_draw import RandomDraw
from qtrain.allocate.reinforcement import Reinforcement
from qtrain.spec import Allocation, LayerBits
from tests.allocate.problems import everything, random_problem
from tests.allocate.test_searches import with_loss

pytest.importorskip("stable_baselines3", reason="the extra rl is not installed")


@pytest.mark.parametrize(
    ("action", "wanted"),
    [((-1, -1), (2, 4)), ((1, 1), (8, 8)), ((0, -1), (4, 4)), ((-0.6, 1), (2, 8)), ((0.9, 0.1), (8, 8))],
)
def test_an_action_stands_for_the_nearest_widths(action: tuple[float, float], wanted: tuple[int, int]) -> None:
    from qtrain.allocate.bit_episodes import option_of

    options = tuple(LayerBits(w, a) for w in (2, 4, 8) for a in (4, 8))
    group = Group(("a",), options, np.zeros(6), np.zeros((0, 6)))
    assert options[option_of(group, np.array(action, np.float32))] == wanted


def test_it_is_better_than_chance_within_the_budget_and_reproducible() -> None:
    asked, measured = with_loss(random_problem(7, layers=5, budgets=1))
    state = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
    agent = Reinforcement(episodes=40, startup=10)
    found = agent.search(asked)
    assert torch.equal(state[0], torch.get_rng_state()), "the run's own random numbers go on as before"
    assert state[1:] == (random.getstate(), np.random.get_state()[1].tolist())
    assert asked.fits(found)
    assert all(map(asked.fits, measured))
    every = sorted(asked.loss(a) for a in everything(asked))
    assert asked.loss(found) <= every[len(every) // 20], "among the best twentieth"
    assert asked.loss(found) < asked.loss(RandomDraw(weight=3, input=4, first=None, last=None).search(asked))
    assert agent.search(asked) == found


@pytest.mark.parametrize("worst", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_never_the_best(worst: float) -> None:
    """The first that is measured is one, and every third of the others."""
    asked, _ = with_loss(random_problem(2, layers=3, budgets=1))
    finite, calls = asked.loss, iter(range(10**6))
    values: dict[str, float] = {}

    def loss(allocation: Allocation) -> float:
        value = worst if next(calls) % 3 == 0 else finite(allocation)
        values[str(allocation)] = value
        return value

    agent = Reinforcement(episodes=12, startup=6)
    found = agent.search(replace(asked, loss=loss))
    assert values[str(found)] == min(value for value in values.values() if np.isfinite(value))
    with pytest.raises(ValueError, match="no loss that was measured is finite"):
        agent.search(replace(asked, loss=lambda _: worst))
