"""A student's file gives the student again: the same logits, and as many bytes as the cost report counts."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qtrain.convert.layers import quant_layers
from qtrain.nn import QuantConv
from qtrain.nn.base import quantized_weight
from qtrain.nn.stored import stored_parts
from qtrain.packed.header import Network, read
from qtrain.packed.load import load_student
from qtrain.pipeline.student_file import allocation_of
from qtrain.quantizers.binary.xnor import XNOR
from qtrain.settings.conf_dir import conf_dir
from tests.packed.students import (
    EVERYWHERE,
    IMAGES,
    KINDS,
    SERVED,
    TIED,
    logits_of,
    round_trip,
    saved,
    settings_with,
    student_of,
    timm_network,
)

NAMES = sorted(path.stem for path in (conf_dir() / "quantizer").glob("*.yaml"))
WEIGHTED = ("conv", "depthwise", "up", "places", "head")
"""The layers of ``Kinds``: a plain, a depthwise and a transposed convolution, an embedding, a linear layer."""

WITHOUT = {"weight": (), "input": ("places",)}
"""Layers that have no such quantizer: indices have nothing to quantize."""


@pytest.mark.parametrize("name", NAMES)
def test_file_gives_the_same_logits_and_has_the_counted_bytes(name: str, tmp_path: Path) -> None:
    path, served = tmp_path / "student.safetensors", 0
    for place in SERVED:
        settings = settings_with(name, place)
        if settings is None:
            continue
        served += 1
        student, images = student_of(KINDS, settings)
        layers = {layer: student.get_submodule(layer) for layer in WEIGHTED}
        made_by = {layer: getattr(module, f"{place}_quantizer") for layer, module in layers.items()}
        assert {layer for layer, quantizer in made_by.items() if quantizer is None} == set(WITHOUT[place])
        kinds = {type(quantizer).__name__ for quantizer in made_by.values() if quantizer is not None}
        assert kinds == {getattr(settings.quantize, place).kind}
        for dtype in (torch.float32, torch.bfloat16):
            student, images = copy.deepcopy(student).to(dtype), images.to(dtype)
            loaded = round_trip(student, path, KINDS, images)
            for layer in WEIGHTED:
                source, copied = student.get_submodule(layer), loaded.get_submodule(layer)
                with torch.no_grad():
                    assert torch.equal(quantized_weight(copied), quantized_weight(source)), (place, dtype, layer)
                assert not torch.equal(copied.weight, source.weight), f"{layer} was not rounded"
    assert served


def test_scale_map_of_xnor_multiplies_the_output_of_the_loaded_layer(tmp_path: Path) -> None:
    network = timm_network("cifar_resnet8", size=16, classes=4, width=0.5)
    binary = ["quantizer@quantize.weight=bwn", "quantizer@quantize.input=xnor"]
    overrides = [*binary, "quantize.bits.weight=1", "quantize.bits.input=1", *EVERYWHERE]
    student, images = student_of(network, overrides, size=16)
    loaded = round_trip(student, tmp_path / "student.safetensors", network, images)
    maps = [m.input_quantizer for m in loaded.modules() if isinstance(m, QuantConv)]
    assert len(maps) > 6
    assert all(isinstance(quantizer, XNOR) and quantizer.scale_map for quantizer in maps)
    for quantizer in maps:
        quantizer.scale_map = False
    assert not torch.equal(logits_of(loaded, images), logits_of(student, images))


STRUCTURES = [
    ["quantize.fold=before"],
    ["quantize.fold=training"],
    ["quantize.fold=before", "equalize@quantize.equalize=cross_layer"],
    ["quantize.operations.add=8"],
    ["quantize.enabled=false"],
]


@pytest.mark.parametrize("overrides", STRUCTURES, ids=" ".join)
def test_structure_of_conversion_is_built_again(overrides: list[str], tmp_path: Path) -> None:
    network = timm_network("cifar_resnet8", size=16, classes=4, width=0.5)
    student, images = student_of(network, overrides, size=16)
    path, again = tmp_path / "student.safetensors", tmp_path / "again.safetensors"
    for layout in (torch.contiguous_format, torch.channels_last):
        student.to(memory_format=layout)
        loaded = round_trip(student, path, network, images)
        assert loaded.conv1.weight.is_contiguous(memory_format=layout)
        saved(loaded, again, network, replace(IMAGES, size=(3, 16, 16)))
        assert again.read_bytes() == path.read_bytes()


def test_file_names_the_modules_whose_operations_were_exposed(tmp_path: Path) -> None:
    network = timm_network("cifar_resnet8", size=16, classes=4, width=0.5)
    student, _ = student_of(network, ["quantize.operations.add=8"], size=16)
    saved(student, tmp_path / "student.safetensors", network, replace(IMAGES, size=(3, 16, 16)))
    assert read(tmp_path / "student.safetensors")[0].structure.exposed == (
        "layer1.0.add",
        "layer2.0.add",
        "layer3.0.add",
    )


def test_integer_state_is_stored_and_counted(tmp_path: Path) -> None:
    student, images = student_of(TIED, [])
    student.get_buffer("order").copy_(torch.tensor([1, 0, 2, 4, 3, 5]))
    loaded = round_trip(student, tmp_path / "student.safetensors", TIED, images)
    assert torch.equal(loaded.get_buffer("order"), student.get_buffer("order"))


def test_operands_with_several_widths_keep_their_type(tmp_path: Path) -> None:
    """Code ranges of 12 bits are no bfloat16 numbers, so the loaded quantizer must have those of the student's type."""
    overrides = ["quantizer@quantize.input=dynamic", "quantize.bits.input=12", *EVERYWHERE]
    student, images = student_of(KINDS, overrides, dtype=torch.bfloat16)
    loaded = round_trip(student, tmp_path / "student.safetensors", KINDS, images)
    assert loaded.conv.input_quantizer.code_high.dtype == torch.bfloat16


def test_equal_students_have_equal_files_that_appear_whole(tmp_path: Path) -> None:
    paths = [tmp_path / "a" / "student.safetensors", tmp_path / "b" / "student.safetensors"]
    for path in paths:
        saved(student_of(KINDS, [])[0], path, KINDS)
        assert [file.name for file in path.parent.iterdir()] == ["student.safetensors"]
    first, second = (path.read_bytes() for path in paths)
    assert first == second


def test_a_student_that_cannot_be_built_again_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    path = tmp_path / "student.safetensors"
    student, _ = student_of(KINDS, [])
    saved(student, path, KINDS)
    before = path.read_bytes()
    for wrong in (Network(KINDS.builder, {"width": 6, "classes": 5}), TIED, Network("tests.packed.networks.Missing")):
        with pytest.raises(ValueError, match=r"network|computes something else") as caught:
            saved(student, path, wrong)
        assert "\n" not in str(caught.value)
        assert [file.name for file in tmp_path.iterdir()] == ["student.safetensors"]
        assert path.read_bytes() == before


def test_loading_leaves_random_numbers_as_they_were(tmp_path: Path) -> None:
    saved(student_of(KINDS, [])[0], tmp_path / "student.safetensors", KINDS)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    load_student(tmp_path / "student.safetensors", builders=["tests.packed.networks"])
    assert torch.equal(torch.rand(3), expected)


def test_channels_that_were_rounded_apart_from_their_norm_are_loaded_so(tmp_path: Path) -> None:
    """After conversion the gammas grew, so that nothing but the file says which channels these are."""
    torch.manual_seed(0)
    network = Network("tests.packed.networks.Kinds", {"width": 8, "gammas": [0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]})
    student, images = student_of(network, [*EVERYWHERE, "quantize.fold=training"])
    with torch.no_grad():
        student.norm.weight.uniform_(0.5, 1.5)
        loaded = round_trip(student, tmp_path / "student.safetensors", network, images)
        # The layers behind may round a difference away, so that equal logits do not show it.
        assert torch.equal(quantized_weight(loaded.conv), quantized_weight(student.conv))
    fixed = read(tmp_path / "student.safetensors")[0].structure.fixed_factors
    assert [factor > 0 for factor in fixed["conv"]] == [True] * 2 + [False] * 6


@pytest.mark.parametrize(
    ("name", "size", "target", "bits"),
    [
        ("test_resnet", 32, "onnxruntime", 4),
        ("test_efficientnet", 32, "onnxruntime", 8),
        ("resnet10t", 32, "openvino", 2),
    ],
)
def test_a_student_for_a_target_keeps_its_shared_quantizers(
    name: str, size: int, target: str, bits: int, tmp_path: Path
) -> None:
    network = timm_network(name, size=size)
    overrides = (f"target={target}", f"quantize.bits.weight={bits}", f"quantize.bits.input={bits}")
    student, images = student_of(network, overrides, size=size)
    loaded = round_trip(student, tmp_path / "student.safetensors", network, images)
    for field in ("shared_inputs", "tensors"):
        assert getattr(stored_parts(loaded), field) == getattr(stored_parts(student), field)
    assert stored_parts(student).shared_inputs
    found = allocation_of(read(tmp_path / "student.safetensors")[0])
    inputs = {n: int(m.input_quantizer.bits) for n, m in quant_layers(student).items() if m.input_quantizer}
    assert {layer: both.input for layer, both in found.items()} == inputs
