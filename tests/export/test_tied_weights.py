"""Weights that several layers share are stored once, and layers that share only some of it stay right."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qtrain.export.header import Network, read
from tests.export.students import EVERYWHERE, TIED, round_trip, student_of

TABLE = Network("tests.export.networks.TiedTable", {"classes": 6})
PAIRS = {"linear": (TIED, "first", "second"), "embedding and linear": (TABLE, "table", "head")}


def full_precision(layer: str) -> list[str]:
    """Overrides that leave the weight of ``layer`` as it is."""
    name = "quantize.policies.float"
    return [f"+policy@{name}=policy", f"{name}.layers=[{layer}]", f"{name}.weight_bits=32"]


@pytest.mark.parametrize("pair", PAIRS)
def test_tied_weights_are_stored_once_and_stay_tied(pair: str, tmp_path: Path) -> None:
    network, first, second = PAIRS[pair]
    student, images = student_of(network, EVERYWHERE)
    path = tmp_path / "student.safetensors"
    loaded = round_trip(student, path, network, images)
    header, tensors = read(path)
    assert loaded.get_submodule(first).weight is loaded.get_submodule(second).weight
    assert header.weight_of(first) == header.weight_of(second)
    assert header.codes_of(first) == header.codes_of(second) == f"{first}.weight"
    assert [name for name in tensors if name in (f"{first}.weight", f"{second}.weight")] == [f"{first}.weight"]


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("pair", PAIRS)
def test_a_tied_weight_of_which_one_side_is_in_full_precision_is_stored_twice(
    pair: str, side: int, tmp_path: Path
) -> None:
    network, *layers = PAIRS[pair]
    student, images = student_of(network, [*EVERYWHERE, *full_precision(layers[side])])
    path = tmp_path / "student.safetensors"
    loaded = round_trip(student, path, network, images)
    _, tensors = read(path)
    quantized, exact = (loaded.get_submodule(layers[place]).weight for place in (1 - side, side))
    assert torch.equal(exact, student.get_submodule(layers[side]).weight)
    assert not torch.equal(quantized, exact)
    assert tensors[f"{layers[side]}.weight"].dtype == torch.float32
    assert tensors[f"{layers[1 - side]}.weight"].dtype == torch.uint8


def test_tied_weights_of_different_bits_are_stored_in_both(tmp_path: Path) -> None:
    student, images = student_of(TABLE, ["quantize.bits.first=null"])
    path = tmp_path / "student.safetensors"
    round_trip(student, path, TABLE, images)
    header, _ = read(path)
    stored = [(header.codes_of(layer), header.weight_of(layer)) for layer in ("table", "head")]
    assert [(name, weight.bits) for name, weight in stored if weight] == [("table.weight", 4), ("head.weight", 8)]


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_kernel_of_a_convolution_and_its_transpose_is_rounded_for_each(granularity: str, tmp_path: Path) -> None:
    """Output channels of one are inputs of the other, so scales of channels cannot be shared."""
    network = Network("tests.export.networks.TiedKernels")
    overrides = [*EVERYWHERE, f"granularity@quantize.weight.granularity={granularity}"]
    student, images = student_of(network, overrides)
    assert student.down.weight is student.up.weight
    assert student.down.weight_quantizer is not student.up.weight_quantizer
    round_trip(student, tmp_path / "student.safetensors", network, images)


def test_parameters_over_the_same_numbers_are_stored_each(tmp_path: Path) -> None:
    network = Network("tests.export.networks.SameStorage")
    student, images = student_of(network, ["quantize.enabled=false"])
    path = tmp_path / "student.safetensors"
    round_trip(student, path, network, images)
    assert {"first.weight", "second.weight"} <= read(path)[1].keys()
