"""Stochastic rounding: up or down at random, so that the mean over draws is the value itself."""

from torch import Tensor

from qtrain.functional.indicator import above


def stochastic_round(x: Tensor, uniform: Tensor) -> Tensor:
    """``floor(x)``, plus 1 with probability ``x - floor(x)`` (Gupta et al. 2015, arXiv 1502.02551, §3).

    ``uniform`` is drawn from [0, 1), one number for each element. The expectation is ``x``; whole numbers stay, so no
    result lies outside a range with whole ends that holds ``x``.
    """
    below = x.floor()
    # Not floor(x + uniform), which the addition's own rounding would push over the next whole number.
    return below + above(x - below, uniform)
