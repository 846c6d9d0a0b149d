"""Shares of variance against functions whose variance is known, and knobs that do not always count."""

from __future__ import annotations

from itertools import product
from random import Random
from typing import Any

import pytest

from qtrain.sweep.importance import FEWEST, knob_importance
from qtrain.sweep.trial import Status, Trial


def trial(knobs: dict[str, Any], top1: float, status: Status = "finished") -> Trial:
    return Trial(id=str(knobs), key="k", status=status, knobs=knobs, metrics={"top1": top1})


def test_shares_of_a_sum_are_those_of_its_variances() -> None:
    """Over uniform a and b in [0, 1], 3a + b has the variances 9/12 and 1/12: nine tenths, one tenth."""
    source = Random(0)
    trials = []
    for _ in range(100):
        a, b, c = (source.random() for _ in range(3))
        trials.append(trial({"c": c, "b": b, "a": a}, 3 * a + b))
    shares = knob_importance(trials, "top1")
    assert list(shares) == ["a", "b", "c"]
    assert 0.95 < sum(shares.values()) < 1  # nothing is chance; the forest's steps leave a little
    assert shares["a"] == pytest.approx(0.9, abs=0.06)
    assert shares["b"] == pytest.approx(0.1, abs=0.06)
    assert shares["c"] < 0.02
    assert knob_importance(trials, "top1") == shares, "the same trials say the same"


def test_a_rate_is_regarded_by_its_digits_and_listed_numbers_by_their_places() -> None:
    """Linear in log10 of a rate over three decades, variance 9/12; one up for each of three widths, variance 2/3."""
    source = Random(1)
    trials = []
    for _ in range(100):
        digits, width = 3 * source.random(), source.choice([2, 3, 8])
        trials.append(trial({"lr": 10 ** (digits - 4), "width": width}, digits + [2, 3, 8].index(width)))
    shares = knob_importance(trials, "top1")
    assert shares["lr"] / sum(shares.values()) == pytest.approx(0.75 / (0.75 + 2 / 3), abs=0.08)


def test_chance_explains_nothing_and_is_no_share_of_a_knob() -> None:
    """Accuracies without a relation to the knobs; then one knob's variance 9/12 beside as much chance."""
    source = Random(1)
    drawn = [{"lr": source.random(), "decay": source.random(), "k": source.choice([1, 2, 3])} for _ in range(60)]
    noise = [source.gauss(90, 1) for _ in drawn]
    assert knob_importance([trial(knobs, top1) for knobs, top1 in zip(drawn, noise, strict=True)], "top1") == {}
    assert (
        knob_importance([trial({"k": knobs["k"]}, top1) for knobs, top1 in zip(drawn, noise, strict=True)], "top1")
        == {}
    )
    half = [trial(k, 3 * k["lr"] + 0.75**0.5 * top1) for k, top1 in zip(drawn, noise, strict=True)]
    shares = knob_importance(half, "top1")
    assert next(iter(shares)) == "lr" and 0.1 < sum(shares.values()) < 0.6  # half of it, less what so few trials hide


def test_words_and_conditions() -> None:
    """The temperature counts with softened outputs only; what it does there is seen, its absence is not its doing."""
    source = Random(2)
    trials = []
    for objective, _ in product(("soft", "hard"), range(100)):
        knobs: dict[str, Any] = {"objective": objective, "dummy": source.choice(["x", "y"])}
        if objective == "soft":
            knobs["temperature"] = source.choice([1.0, 2.0, 4.0])
        trials.append(trial(knobs, 10.0 * (objective == "soft") + (knobs.get("temperature") == 4.0)))
    shares = knob_importance(trials, "top1")
    assert list(shares) == ["objective", "temperature", "dummy"]
    assert shares["objective"] > 0.8
    assert shares["temperature"] > 3 * shares["dummy"]


def test_what_never_turned_has_no_share_and_what_turned_alone_has_all() -> None:
    trials = [trial({"seed": 0, "width": width}, width + i / 1000) for i, width in enumerate([2, 3, 4] * 6)]
    assert knob_importance(trials, "top1") == {"width": pytest.approx(1.0, abs=0.02), "seed": 0.0}


def test_nothing_is_said_of_too_little() -> None:
    many = [trial({"width": width % 2}, float(width % 2)) for width in range(FEWEST)]
    assert list(knob_importance(many, "top1")) == ["width"]
    assert knob_importance(many[:-1], "top1") == {}
    assert knob_importance(many, "bops") == {}
    assert knob_importance([trial({"width": width}, 50.0) for width in range(9)], "top1") == {}
    assert knob_importance([trial({}, float(i)) for i in range(9)], "top1") == {}
    stopped = [trial({"width": width}, float(width), "stopped") for width in range(9)]
    assert knob_importance(stopped, "top1") == {}
