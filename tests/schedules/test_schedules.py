"""Schedules: pure functions of progress, with the values that their formulas give."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtrain.schedules.constant import Constant
from qtrain.schedules.cosine import Cosine
from qtrain.schedules.linear import Linear
from qtrain.schedules.step import Step

PROGRESS = st.floats(0, 1)


@given(PROGRESS)
def test_constant(progress: float) -> None:
    assert Constant(value=0.3)(progress) == 0.3


@pytest.mark.parametrize(("progress", "value"), [(0, 2.0), (0.25, 2.0), (0.5, 1.5), (0.75, 1.0), (1, 1.0)])
def test_linear(progress: float, value: float) -> None:
    assert Linear(start=2.0, end=1.0, begin=0.25, finish=0.75)(progress) == pytest.approx(value)


@pytest.mark.parametrize(
    ("progress", "value"), [(0, 1.0), (0.4999, 1.0), (0.5, 0.1), (0.74, 0.1), (0.75, 0.01), (1, 0.01)]
)
def test_step(progress: float, value: float) -> None:
    assert Step(milestones=[0.75, 0.5], factor=0.1)(progress) == pytest.approx(value)


@pytest.mark.parametrize(
    ("progress", "value"),
    [(0, 0.2), (0.05, 0.6), (0.1, 1.0), (0.55, 0.5), (1.0, 0.0), (0.325, 0.5 + 0.5 * math.cos(math.pi / 4))],
)
def test_cosine_with_warm_up(progress: float, value: float) -> None:
    assert Cosine(warmup=0.1, warmup_from=0.2)(progress) == pytest.approx(value, abs=1e-9)


@given(PROGRESS, PROGRESS)
def test_cosine_falls_from_start_to_end(one: float, two: float) -> None:
    cosine = Cosine(start=3.0, end=0.5)
    assert 0.5 <= cosine(max(one, two)) <= cosine(min(one, two)) <= 3.0


def test_progress_beyond_the_end_stays_at_the_end() -> None:
    """Lightning asks for the rate once more after the last step."""
    assert Cosine()(1.01) == pytest.approx(0.0)
    assert Linear(start=1.0, end=0.2)(1.01) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: Cosine(warmup=1.0), r"Cosine: warmup is a share of the run and must be in \[0, 1\), got 1"),
        (lambda: Cosine(warmup_from=2.0), r"Cosine: warmup_from is a share of the run and must be in \[0, 1\], got 2"),
        (lambda: Linear(start=1, end=0, begin=0.5, finish=0.5), "Linear: begin must come before finish"),
        (lambda: Linear(start=1, end=0, finish=30), "Linear: finish is a share of the run"),
        (lambda: Step(milestones=[100], factor=0.1), "Step: a milestone is a share of the run"),
    ],
)
def test_epochs_given_for_shares_are_refused(make: object, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        make()  # type: ignore[operator]
