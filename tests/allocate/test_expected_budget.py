"""Prices of budgets: expected costs meet what they must, and the shares are the closest ones that do."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.special import softmax

from qtrain.allocate.expected_budget import prices_of_budgets
from qtrain.allocate.problem import Floats


def problem(budgets: int) -> tuple[list[Floats], list[Floats]]:
    """Strengths and costs of five groups of six options; a share of all options alike costs 1 in each budget."""
    rng = np.random.default_rng(0)
    costs = [rng.uniform(0.05, 0.35, (budgets, 6)) for _ in range(5)]
    scale = sum(cost.mean(1, keepdims=True) for cost in costs)
    return [rng.normal(size=6) for _ in costs], [cost / scale for cost in costs]


def expected(strengths: list[Floats], costs: list[Floats], prices: Floats) -> Floats:
    return np.sum([c @ softmax(s - prices @ c) for s, c in zip(strengths, costs, strict=True)], axis=0)


def test_one_budget_is_met_at_the_price_that_bisection_finds() -> None:
    strengths, costs = problem(1)
    room = np.array([0.8])
    right = brentq(lambda price: expected(strengths, costs, np.array([price]))[0] - 0.8, 0, 1000, xtol=1e-10)
    assert prices_of_budgets(strengths, costs, room) == pytest.approx([right], rel=1e-3)


def test_a_budget_that_is_not_reached_has_no_price() -> None:
    strengths, costs = problem(2)
    assert prices_of_budgets(strengths, costs, np.array([3.0, 3.0])) == pytest.approx([0, 0])
    prices = prices_of_budgets(strengths, costs, np.array([3.0, 0.8]))
    assert prices[0] == 0 and prices[1] > 0
    assert expected(strengths, costs, prices)[1] == pytest.approx(0.8, abs=1e-4)


def test_of_all_shares_within_two_budgets_these_diverge_least() -> None:
    """Any other shares with the same expected costs are farther from the strengths' own."""
    strengths, costs = problem(2)
    room = np.array([0.8, 0.85])
    prices = prices_of_budgets(strengths, costs, room)
    assert (prices > 0).all()
    assert expected(strengths, costs, prices) == pytest.approx(room, abs=1e-4)
    rng = np.random.default_rng(1)
    for strength, cost in zip(strengths, costs, strict=True):
        shares, own = softmax(strength - prices @ cost), softmax(strength)
        fixed = np.linalg.qr(np.vstack([np.ones(6), cost]).T)[0]  # directions that change the sum or the costs
        for _ in range(20):
            step = rng.normal(size=6)
            step -= fixed @ (fixed.T @ step)
            other = shares + 1e-3 * shares.min() * step / np.abs(step).max()
            assert (other * np.log(other / own)).sum() > (shares * np.log(shares / own)).sum()


def test_without_budgets_there_are_no_prices() -> None:
    assert len(prices_of_budgets([np.zeros(3)], [np.zeros((0, 3))], np.zeros(0))) == 0


def test_a_budget_that_the_cheapest_options_alone_meet_is_come_close_to() -> None:
    strengths, costs = problem(1)
    least = sum(cost.min() for cost in costs)
    prices = prices_of_budgets(strengths, costs, np.array([least]))
    assert expected(strengths, costs, prices)[0] == pytest.approx(least, rel=0.01)
