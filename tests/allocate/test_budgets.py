"""Budgets as people write them."""

import pytest

from qtrain.allocate.budgets import budget_of


@pytest.mark.parametrize(
    ("value", "unit", "wanted"),
    [
        (120000, "bytes", 120000.0),
        ("120000", "bytes", 120000.0),
        ("120 kB", "bytes", 120e3),
        ("1.5MB", "bytes", 1.5e6),
        ("2 KiB", "bytes", 2048.0),
        ("64 B", "bytes", 64.0),
        ("7 bytes", "bytes", 7.0),
        ("0.6 G", "operations", 0.6e9),
        ("1e9", "operations", 1e9),
        ("3 ms", "ms", 3.0),
        (2.5, "uJ", 2.5),
        ("80%", "ms", 8.0),
        ("12.5 %", "bytes", 1.25),
    ],
)
def test_a_budget_in_its_unit(value: object, unit: str, wanted: float) -> None:
    assert budget_of("x", value, unit=unit, reference=10.0) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(
    ("value", "unit"),
    [
        ("3 s", "ms"),
        ("3 kms", "ms"),
        ("kB", "bytes"),
        ("-3", "bytes"),
        (True, "bytes"),
        (None, "ms"),
        ("3 ms", "bytes"),
    ],
)
def test_what_is_no_budget_is_refused_with_an_example(value: object, unit: str) -> None:
    with pytest.raises(ValueError, match=rf"budgets\.x: must be a number of {unit} such as .*'80%', got"):
        budget_of("x", value, unit=unit, reference=10.0)
