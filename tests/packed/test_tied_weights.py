"""Weights that several layers share are stored once, and layers that share only some of it stay right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from qtrain.costs.count import count
from qtrain.packed.header import Network, read
from tests.packed.students import EVERYWHERE, TIED, round_trip, student_of, timm_network

TABLE = Network("tests.packed.networks.TiedTable", {"classes": 6})
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
    network = Network("tests.packed.networks.TiedKernels")
    overrides = [*EVERYWHERE, f"granularity@quantize.weight.granularity={granularity}"]
    student, images = student_of(network, overrides)
    assert student.down.weight is student.up.weight
    assert student.down.weight_quantizer is not student.up.weight_quantizer
    round_trip(student, tmp_path / "student.safetensors", network, images)


@pytest.mark.parametrize(("overrides", "numbers"), [(["quantize.enabled=false"], 9 * 4), (EVERYWHERE, 9 / 2 + 3 * 4)])
def test_parameters_over_the_same_memory_are_stored_once(
    overrides: Sequence[str], numbers: float, tmp_path: Path
) -> None:
    """9 floats, or 9 codes of 4 bits in whole bytes and a scale for each of 3 outputs."""
    network = Network("tests.packed.networks.SameStorage")
    student, images = student_of(network, overrides)
    path = tmp_path / "student.safetensors"
    loaded = round_trip(student, path, network, images)
    _, tensors = read(path)
    assert [name for name in tensors if name.endswith(".weight")] == ["first.weight"]
    assert tensors["first.weight"].numel() * tensors["first.weight"].element_size() == math.ceil(numbers)
    assert loaded.first.weight is loaded.second.weight


def test_a_module_with_several_names_is_stored_once(tmp_path: Path) -> None:
    """timm's CoaT hands its position encodings to each of its blocks."""
    network = timm_network("coat_lite_tiny", size=32)
    student, images = student_of(network, (), size=32)
    assert student.cpe1 is student.serial_blocks1[0].cpe
    path = tmp_path / "student.safetensors"
    loaded = round_trip(student, path, network, images)
    assert loaded.cpe1 is loaded.serial_blocks1[1].cpe
    assert [name for name in read(path)[1] if name.endswith(("cpe1.proj.weight", "cpe.proj.weight"))] == [
        "cpe1.proj.weight"
    ]


def test_two_convolutions_with_one_weight_cost_one(tmp_path: Path) -> None:
    """8 x 8 x 3 x 3 codes of a byte, a scale for each of 8 outputs, and the scales of two inputs."""
    network = Network("tests.packed.networks.TiedConvolutions")
    student, images = student_of(network, [*EVERYWHERE, "quantize.bits.weight=8", "quantize.bits.input=8"], channels=8)
    round_trip(student, tmp_path / "student.safetensors", network, images)
    assert count(student, images[:1]).size_bytes == 8 * 8 * 3 * 3 + 8 * 4 + 2 * 4 == 616
