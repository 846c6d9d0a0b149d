"""Shares of options whose expected costs meet all budgets."""

from collections.abc import Sequence

import numpy as np
from scipy.optimize import minimize
from scipy.special import logsumexp, softmax

from qtrain.allocate.problem import Floats


def prices_of_budgets(strengths: Sequence[Floats], costs: Sequence[Floats], room: Floats) -> Floats:
    """The least prices, (M,), at which the shares' expected costs exceed none of the M budgets.

    Each group of layers has ``strengths`` (O,) and ``costs`` (M, O), as parts of each budget; ``room`` (M,) is what
    each budget leaves to all groups. Shares are ``softmax(strengths - prices @ costs)``. Of all shares within the
    budgets these are the closest to ``softmax(strengths)`` in Kullback-Leibler divergence, and the prices are the
    multipliers of the budgets: 0 where one is not reached. They minimize the convex dual
    ``sum_groups logsumexp(strengths - prices @ costs) + prices @ room``. A budget that the cheapest options alone
    meet has no finite price; the answer then comes close to it.
    """
    if not len(room):
        return np.zeros(0)

    def dual(prices: Floats) -> tuple[float, Floats]:
        value, slope = float(prices @ room), room.copy()
        for strength, cost in zip(strengths, costs, strict=True):
            logits = strength - prices @ cost
            value += float(logsumexp(logits))
            slope -= cost @ softmax(logits)
        return value, slope

    found = minimize(dual, np.zeros(len(room)), jac=True, method="L-BFGS-B", bounds=[(0, None)] * len(room))
    prices: Floats = found.x
    return prices
