"""The rule for options that are numbers."""

from __future__ import annotations

import math

import pytest

from qtrain.utils.checks import check_range


@pytest.mark.parametrize(
    ("interval", "right", "wrong", "rule"),
    [
        ("[0, 1)", (0, 0.5), (-0.1, 1.0, math.nan), r"in \[0, 1\)"),
        ("(0, 1]", (0.1, 1), (0, 1.1), r"in \(0, 1\]"),
        ("[1, inf)", (1, 10**9), (0, math.nan), "at least 1"),
        ("(0, inf)", (1e-9, math.inf), (0.0, -1), "above 0"),
    ],
)
def test_check_range_refuses_what_lies_outside_of_the_interval(
    interval: str, right: tuple[float, ...], wrong: tuple[float, ...], rule: str
) -> None:
    for value in right:
        check_range("Owner", interval, given=value, absent=None)
    for value in wrong:
        with pytest.raises(ValueError, match=f"^Owner: given must be {rule}, got {value}; 1 is usual$"):
            check_range("Owner", interval, given=value, hint="1 is usual")
