"""Spaces: conditions, overrides, all combinations, and mistakes."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import pytest

from qtrain.spec import LayerBits
from qtrain.sweep.bit_widths import BitWidths
from qtrain.sweep.first_last_bits import FirstLastBits
from qtrain.sweep.knobs import Bundle, Choice, IntegerRange, Knob, LogUniformRange, UniformRange, spelled
from qtrain.sweep.space import MANUAL, Space

LAYERS = ["conv1", "layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1", "layer2.0.conv2", "fc"]
BASE = {name: LayerBits(4, 6) for name in LAYERS}


def conditional() -> Space:
    """The temperature counts with softened outputs only, its decay only where it is high."""
    return Space(
        {
            "decay": Choice(options=[0.1, 0.5], key="x.decay", when={"distill.temperature": [4.0]}),
            "distill.temperature": Choice(options=[1.0, 4.0], when={"objective": ["soft", "kl"]}),
            "objective": Choice(options=["soft", "hard", "kl"]),
            "schedule": Bundle(options={"plain": [], "long": ["fit.epochs=9"]}),
        }
    )


def test_a_knob_counts_where_all_of_its_conditions_hold() -> None:
    source = Random(0)
    drawn = [conditional().choose(lambda name, domain: domain.draw(source)) for _ in range(200)]
    for point in drawn:
        assert ("distill.temperature" in point) == (point["objective"] != "hard")
        assert ("decay" in point) == (point.get("distill.temperature") == 4.0)
    assert {len(point) for point in drawn} == {2, 3, 4}


def test_all_combinations_are_those_that_conditions_let_be() -> None:
    expected = set()
    for objective, temperature, decay, schedule in product(
        ("soft", "hard", "kl"), (1.0, 4.0), (0.1, 0.5), ("plain", "long")
    ):
        point: dict[str, Any] = {"objective": objective, "schedule": schedule}
        if objective != "hard":
            point["distill.temperature"] = temperature
            if temperature == 4.0:
                point["decay"] = decay
        expected.add(frozenset(point.items()))
    found = list(conditional().combinations(4))
    assert {frozenset(point.items()) for point in found} == expected
    assert len(found) == len(expected) == conditional().count(4)


def test_ranges_count_as_so_many_points_and_widths_as_their_choices() -> None:
    space = Space(
        {"lr": UniformRange(low=0, high=1), "n": IntegerRange(low=1, high=3), "widths": BitWidths(choices=[2, 3, 4])},
        layers=LAYERS,
    )
    assert space.count(5) == len(list(space.combinations(5))) == 5 * 3 * 3**2
    wide = Space({"widths": BitWidths(choices=[2, 3, 4], per="layer")}, layers=[f"l{i}" for i in range(42)])
    assert wide.count(2) == 3**40, "counted without being made"


def test_equal_points_are_equal_overrides_and_what_does_not_count_is_not_there() -> None:
    space = conditional()
    point = {"objective": "hard", "schedule": "long"}
    assert space.overrides({**point, "distill.temperature": 4.0}) == space.overrides(point)
    assert sorted(space.overrides(point)) == ["fit.epochs=9", "objective=hard"]


def test_bits_of_several_knobs_come_together_over_the_base() -> None:
    space = Space(
        {
            "w": BitWidths(choices=[2, 3], of="weight"),
            "a": BitWidths(choices=[2, 8], of="input", per="model", first_last=None),
        },
        layers=LAYERS,
        base=BASE,
    )
    point = {"w.layer1.0": 2, "w.layer2.0": 3, "a": 8}
    assert space.overrides(point) == [
        MANUAL,
        "++quantize.bits.layers={conv1:[8,8],layer1.0.conv1:[2,8],layer1.0.conv2:[2,8],layer2.0.conv1:[3,8],"
        "layer2.0.conv2:[3,8],fc:[8,8]}",
    ]
    weights = Space({"w": BitWidths(choices=[2], of="weight")}, layers=LAYERS, base=BASE)
    assert "layer2.0.conv1:[2,6]" in weights.overrides({"w.layer1.0": 2, "w.layer2.0": 2})[-1], "inputs stay"


@pytest.mark.parametrize("order", [("widths", "first_last"), ("first_last", "widths")])
def test_ends_have_the_last_word_on_the_first_and_the_last_layer(order: tuple[str, str]) -> None:
    knobs = {"widths": BitWidths(choices=[2, 3]), "first_last": FirstLastBits(choices=[6, 4])}
    space = Space({name: knobs[name] for name in order}, layers=LAYERS, base=BASE)
    (override,) = [o for o in space.overrides(space.completed({"widths": 2, "first_last": 6})) if "bits.layers" in o]
    inner = LAYERS[1:-1]
    expected = {LAYERS[0]: [6, 6], **{layer: [2, 2] for layer in inner}, LAYERS[-1]: [6, 6]}
    assert override == f"++quantize.bits.layers={spelled(expected)}"
    assert space.parameters["first_last"].values == (4, 6)  # type: ignore[union-attr]


def test_a_start_is_completed_for_knobs_of_several_parameters() -> None:
    space = Space({"widths": BitWidths(choices=[2, 3, 4]), "lr": LogUniformRange(low=1e-4, high=1e-2)}, layers=LAYERS)
    assert space.completed({"widths": 3}) == {"widths.layer1.0": 3, "widths.layer2.0": 3}
    assert space.completed({"widths": {"layer2.0": 2}, "lr": 1e-3}) == {"widths.layer2.0": 2, "lr": 1e-3}


def test_a_few_points_cover_every_value() -> None:
    space = Space({**conditional().knobs, "lr": UniformRange(low=0, high=1)})
    points = list(space.covering())
    for name, domain in space.parameters.items():
        assert {point[name] for point in points if name in point} == set(domain.grid(2)), name
    assert len(points) <= 8


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        (lambda: {}, "the space is empty.*add a knob"),
        (
            lambda: {
                "lr": UniformRange(low=0, high=1, when={"objectve": ["soft"]}),
                "objective": Choice(options=["soft"]),
            },
            r"lr\.when: there is no knob 'objectve' in the space; did you mean 'objective'\?",
        ),
        (
            lambda: {
                "lr": UniformRange(low=0, high=1, when={"objective": ["sotf"]}),
                "objective": Choice(options=["soft"]),
            },
            r"lr\.when\.objective: must be one of soft, got 'sotf'",
        ),
        (
            lambda: {"a": Choice(options=[1], when={"b": [1]}), "b": Choice(options=[1], when={"a": [1]})},
            "a, b: their conditions depend on each other",
        ),
        (
            lambda: {"lr": UniformRange(low=0, high=1, when={"widths": [2]}), "widths": BitWidths(choices=[2])},
            r"lr\.when\.widths: has bits of several layers",
        ),
        (
            lambda: {"w.layer1.0": Choice(options=[1]), "w": BitWidths(choices=[2])},
            r"w: 'w\.layer1\.0' is the name of another knob as well",
        ),
    ],
)
def test_spaces_that_cannot_be_are_refused(knobs: Callable[[], dict[str, Knob]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Space(knobs(), layers=LAYERS)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ({"width": 3}, "there is no knob 'width' in the space; did you mean 'widths'"),
        ({"widths": 5}, r"widths\.layer1\.0: must be one of 2, 3, got 5"),
        ({"widths": {"layer3.0": 2}}, r"widths: there is no 'layer3\.0'; did you mean 'layer"),
        ({"lr": 2.0}, "lr: must be a number from 0 to 1, got 2.0"),
    ],
)
def test_a_start_outside_the_space_is_refused(start: dict[str, Any], message: str) -> None:
    space = Space({"widths": BitWidths(choices=[2, 3]), "lr": UniformRange(low=0, high=1)}, layers=LAYERS)
    with pytest.raises(ValueError, match=message):
        space.completed(start)


def test_bits_to_begin_with_come_from_a_file(tmp_path: Path) -> None:
    """Of layers that share a width the most counts; a width that is none of the choices becomes the next above."""
    path = tmp_path / "allocation.yaml"
    path.write_text(
        "layers: {conv1: [8, 8], layer1.0.conv1: [3, 4], layer1.0.conv2: [2, 2], layer2.0.conv1: [5, 2], fc: [8, 8]}"
    )
    layers = ["conv1", "layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1", "fc"]
    knobs = {
        "weights": BitWidths(choices=[2, 3, 6], of="weight", per="block"),
        "inputs": BitWidths(choices=[2, 3], of="input", per="layer"),
    }
    point = Space(knobs, layers=layers).completed({"weights": str(path), "inputs": str(path)})
    assert point == {
        "weights.layer1.0": 3, "weights.layer2.0.conv1": 6,
        "inputs.layer1.0.conv1": 3, "inputs.layer1.0.conv2": 2, "inputs.layer2.0.conv1": 2,
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"weights: cannot read nowhere\.yaml"):
        Space(knobs, layers=layers).completed({"weights": "nowhere.yaml"})
