"""A student that calibration alone ruins comes with the overrides that usually help, and others come without."""

from __future__ import annotations

import re

import pytest

from qtrain.config.compose import compose
from qtrain.report.calibration_advice import calibration_advice

BEST = """
    quantize.weight.init=range quantize.input.init=range rounding@quantize.rounding=brecq
    granularity@quantize.weight.granularity=channel
""".split()


def advice(*overrides: str, full_precision: float | None = 91.0, calibrated: float | None = 40.0) -> str | None:
    settings = compose(["task=calibrate", *overrides])
    return calibration_advice(settings, full_precision=full_precision, calibrated=calibrated)


def advised(*overrides: str) -> list[str]:
    """The overrides that the line says to type."""
    line = advice(*overrides)
    assert line is not None
    assert "\n" not in line
    return [word for word in line.split("what usually helps: ")[1].split() if "=" in word]


def test_advice_begins_with_what_was_lost() -> None:
    line = advice()
    assert line is not None
    assert line.startswith("calibrated, the student has 40.00 %, 51.0 points less than in full precision; what usually")
    training = advice("task=train")
    assert training is not None
    assert training.startswith("calibrated only, before training, the student has 40.00 %")


def test_what_is_in_use_is_not_advised() -> None:
    assert advised("granularity@quantize.weight.granularity=tensor") == [
        "quantize.weight.init=range",
        "quantize.input.init=range",
        "granularity@quantize.weight.granularity=channel",
        "observer@quantize.input_observer=percentile",
        "rounding@quantize.rounding=brecq",
    ]
    assert advised(*BEST) == ["observer@quantize.input_observer=percentile"]
    assert advised(*BEST, "observer@quantize.input_observer=min_max") == [
        "observer@quantize.input_observer=squared_error"
    ]
    assert "rounding@quantize.rounding=squant" in advised("quantize.calibration=statistics", "quantize.fold=before")


@pytest.mark.parametrize(
    "chosen",
    [
        ["granularity@quantize.weight.granularity=tensor"],
        ["quantizer@quantize.weight=outlier", "granularity@quantize.weight.quantizer.granularity=tensor"],
        [
            "quantizer@quantize.weight=quant_noise",
            "quantizer@quantize.weight.quantizer=lsq",
            "quantizer@quantize.input=pact",
        ],
        ["+experiment=cifar10/oscillation"],
        ["quantizer@quantize.weight=apot"],
    ],
)
def test_what_is_advised_composes(chosen: list[str]) -> None:
    overrides = advised(*chosen)
    assert overrides
    assert advice(*chosen, *overrides) != advice(*chosen)


def test_methods_without_a_remedy_get_no_advice() -> None:
    binary = ["quantizer@quantize.weight=bwn", "quantizer@quantize.input=xnor", "quantize.bits.weight=1"]
    assert advice(*binary) is None


@pytest.mark.parametrize(("before", "after"), [(91.0, 81.0), (None, 10.0), (91.0, None)])
def test_small_falls_and_unknown_ones_get_no_advice(before: float | None, after: float | None) -> None:
    assert advice(full_precision=before, calibrated=after) is None


def test_much_is_more_than_ten_points() -> None:
    line = advice(full_precision=91.0, calibrated=80.99)
    assert line is not None
    assert re.search(r"80\.99 %, 10\.0 points", line)
