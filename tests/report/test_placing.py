"""Labels in a column: they keep apart, inside, and near to what they name."""

from __future__ import annotations

import doctest
from itertools import pairwise

import numpy as np
import pytest
from scipy.optimize import minimize

from qtrain.report import placing
from qtrain.report.placing import spread


@pytest.mark.parametrize("values", [[5.0], [1.0, 1.0, 1.0], [0.0, 0.1, 9.8, 9.9, 10.0], [-3.0, 2.0, 2.5, 14.0]])
def test_labels_are_as_near_as_they_can_be(values: list[float]) -> None:
    """Against a general solver of the same quadratic program."""
    found = spread(values, distance=1.5, low=0.0, high=10.0)
    apart = [{"type": "ineq", "fun": lambda y, i=i: y[i + 1] - y[i] - 1.5} for i in range(len(values) - 1)]
    start = np.linspace(0.0, 10.0, len(values)) if len(values) > 1 else np.array([3.0])
    solved = minimize(lambda y: np.square(y - values).sum(), start, bounds=[(0, 10)] * len(values), constraints=apart)
    assert found == pytest.approx(solved.x, abs=1e-4)


def test_labels_without_room_stand_evenly() -> None:
    found = spread([5.0] * 11, distance=3.0, low=0.0, high=10.0)
    assert found == pytest.approx(list(range(11))) and all(a < b for a, b in pairwise(found))


def test_examples_in_docstrings_hold() -> None:
    result = doctest.testmod(placing)
    assert result.attempted > 0 and result.failed == 0
