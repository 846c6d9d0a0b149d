"""Values that are held between milestones, and the part of a schedule that a stage sees."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtrain.schedules.base import Schedule
from qtrain.schedules.cosine import Cosine
from qtrain.schedules.linear import Linear
from qtrain.schedules.plateaus import Plateaus
from qtrain.schedules.window import Window


@pytest.mark.parametrize(
    ("progress", "value"), [(0, 8), (0.09, 8), (0.1, 4), (0.29, 4), (0.3, 3), (0.5, 2), (1, 2), (1.01, 2)]
)
def test_plateaus(progress: float, value: float) -> None:
    assert Plateaus(values=[8, 4, 3, 2], milestones=[0.1, 0.3, 0.5])(progress) == value


def test_plateaus_of_equal_length() -> None:
    bits = Plateaus(values=[8, 4, 3, 2])
    assert [bits(step / 8) for step in range(8)] == [8, 8, 4, 4, 3, 3, 2, 2]
    assert Plateaus(values=[5])(0.7) == 5


@given(st.floats(0, 1), st.floats(0, 0.4), st.floats(0.5, 1))
def test_a_window_is_the_schedule_at_its_share(progress: float, begin: float, finish: float) -> None:
    line = Linear(start=0.0, end=1.0)
    seen = Window(schedule=line, begin=begin, finish=finish)(progress)
    assert seen == pytest.approx(begin + progress * (finish - begin))


@pytest.mark.parametrize("schedule", [Cosine(warmup=0.1), Plateaus(values=[8, 4, 3, 2])])
def test_windows_one_after_the_other_are_the_whole(schedule: Schedule) -> None:
    """Sixteen steps in one run, and the same as a stage of four and one of twelve."""
    whole = [schedule(step / 16) for step in range(16)]
    first, second = Window(schedule=schedule, finish=0.25), Window(schedule=schedule, begin=0.25)
    assert [first(step / 4) for step in range(4)] + [second(step / 12) for step in range(12)] == pytest.approx(whole)


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: Plateaus(values=[]), "Plateaus: values is empty"),
        (lambda: Plateaus(values=[8, 4], milestones=[]), "Plateaus: 2 values need 1 milestones between them, got 0"),
        (lambda: Plateaus(values=[8, 4, 2], milestones=[0.5, 0.5]), "Plateaus: milestones must rise"),
        (lambda: Plateaus(values=[8, 4], milestones=[30]), "Plateaus: a milestone is a share of the run"),
        (lambda: Window(schedule=Cosine(), begin=0.5, finish=0.5), "Window: begin must come before finish"),
        (lambda: Window(schedule=Cosine(), finish=2), "Window: finish is a share of the run"),
    ],
)
def test_invalid_schedules_are_refused(make: object, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        make()  # type: ignore[operator]
