"""Trials that a sweep was told to begin with are known by their place and by what they are."""

from __future__ import annotations

from typing import Any

import pytest

from qtrain.config.compose import compose
from qtrain.sweep.initial_trials import is_start


@pytest.mark.parametrize(
    ("id", "knobs", "expected"),
    [
        ("0001", {"widths.layer1.0": 4, "widths.layer2.0": 4, "lr": 0.1}, True),
        ("0002", {"widths.layer1.0": 4, "widths.layer2.0": 4, "lr": 0.1}, True),  # in place of one left out
        ("0003", {"widths.layer1.0": 4, "widths.layer2.0": 4, "lr": 0.1}, False),
        ("0001", {"widths.layer1.0": 4, "widths.layer2.0": 2, "lr": 0.1}, False),
        ("0001", {"widths.layer1.0": 4, "widths.layer2.0": 4, "lr": 0.2}, False),
        ("0002", {"widths.layer1.0": 3, "widths.layer2.0": 2, "lr": 0.5}, True),
        ("0002", {"widths.layer1.0": 4, "widths.layer2.0": 2, "lr": 0.5}, False),
        ("0002", {"widths.layer1.0": 3, "generation": 1}, True),
    ],
)
def test_a_start_has_its_values_and_is_among_the_first(id: str, knobs: dict[str, Any], expected: bool) -> None:
    cfg = compose(["sweep.start=[{widths:4,lr:0.1},{widths:{layer1.0:3}}]"])
    assert is_start(cfg, id, knobs) == expected
