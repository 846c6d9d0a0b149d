"""Budgets as people write them."""

import pytest

from qtrain.allocate.budgets import budget_of
from qtrain.costs.metrics.area import Area
from qtrain.costs.metrics.base import CostMetric
from qtrain.costs.metrics.bit_operations import BitOperations
from qtrain.costs.metrics.energy import Energy
from qtrain.costs.metrics.latency import Latency
from qtrain.costs.metrics.olaccel import OLAccel
from qtrain.costs.metrics.size import EffectiveBits, SizeBytes


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
        ("0.6 G", "bit operations", 0.6e9),
        ("1e9", "bit operations", 1e9),
        ("600 M", "bit operations", 0.6e9),
        ("7 bit operations", "bit operations", 7.0),
        ("3 ms", "us", 3000.0),
        ("3 us", "us", 3.0),
        ("2 s", "us", 2e6),
        ("0.5 mJ", "uJ", 500.0),
        ("1.5 mm2", "mm2", 1.5),
        (2.5, "uJ", 2.5),
        ("80%", "us", 8.0),
        ("12.5 %", "bytes", 1.25),
    ],
)
def test_a_budget_in_its_unit(value: object, unit: str, wanted: float) -> None:
    assert budget_of("x", value, unit=unit, reference=10.0) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(
    ("value", "unit"),
    [("3 J", "us"), ("3 xs", "us"), ("kB", "bytes"), ("-3", "bytes"), (True, "us"), (None, "us"), ("3 ms", "bytes")],
)
def test_what_is_no_budget_is_refused_with_an_example(value: object, unit: str) -> None:
    with pytest.raises(ValueError, match=rf"budgets\.x: must be a number of {unit} such as .*'80%', got"):
        budget_of("x", value, unit=unit, reference=10.0)


@pytest.mark.parametrize("metric", [SizeBytes, BitOperations, Latency, Energy, OLAccel, Area, EffectiveBits])
def test_the_example_in_the_message_is_itself_a_budget(metric: type[CostMetric]) -> None:
    with pytest.raises(ValueError, match="must be") as refused:
        budget_of("x", "soon", unit=metric.unit, reference=1.0)
    example = str(refused.value).split("'")[1]
    assert budget_of("x", example, unit=metric.unit, reference=1.0) > 0
