"""A student's file gives the student again: the same logits, and as many bytes as the cost report counts."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from qtrain.costs.count import count
from qtrain.export.header import FileSize, Images, Network, read
from qtrain.export.load import load_student
from qtrain.export.save import save_student
from qtrain.models.factory import create_model
from qtrain.models.weight_file import read_weight_file
from qtrain.settings.conf_dir import conf_dir
from qtrain.spec import QuantSpec
from tests.export.students import IMAGES, KINDS, OWN, TIED, logits_of, settings_of, student_of

NAMES = sorted(path.stem for path in (conf_dir() / "quantizer").glob("*.yaml"))
PLACES = {"weight": QuantSpec(bits=4, shape=(8, 4, 3, 3), signed=True), "input": QuantSpec(bits=4)}
EVERYWHERE = ["quantize.bits.first=null", "quantize.bits.last=null"]
"""The same bits for all layers."""


def bits_of(name: str, place: str) -> int | None:
    """The first of the usual bit widths that the quantizer has there, or ``None`` where it is not made for that."""
    made = getattr(settings_of(f"quantizer@quantize.{place}={name}").quantize, place).build()
    for bits in (4, 2, 1):
        with contextlib.suppress(ValueError):
            made(spec=replace(PLACES[place], bits=bits))
            return bits
    return None


def saved(student: nn.Module, path: Path, network: Network, images: Images = IMAGES) -> FileSize:
    return save_student(student, path, network=network, images=images, builders=OWN)


CASES = [(name, place, bits) for name in NAMES for place in PLACES if (bits := bits_of(name, place)) is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "place", "bits"), CASES)
def test_file_gives_the_same_logits_and_has_the_counted_bytes(
    name: str, place: str, bits: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    options = ["quantize.input.scale_map=false"] if name == "xnor" else []  # the map is for plain convolutions only
    chosen = [f"quantizer@quantize.{place}={name}", f"quantize.bits.{place}={bits}"]
    student, images = student_of(KINDS, [*chosen, *EVERYWHERE, *options], dtype=dtype)
    path = tmp_path / "student.safetensors"
    size = saved(student, path, KINDS)
    loaded = load_student(path, builders=OWN)
    assert torch.equal(logits_of(loaded, images), logits_of(student, images))
    assert not loaded.training
    assert path.stat().st_size == size.file_bytes == size.header_bytes + count(student, images[:1]).size_bytes
    assert count(loaded, images[:1]).size_bytes == count(student, images[:1]).size_bytes
    assert path.stat().st_mode & 0o777 == 0o644


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    student, images = student_of(TIED, EVERYWHERE)
    path = tmp_path / "student.safetensors"
    saved(student, path, TIED)
    header, tensors = read(path)
    loaded = load_student(path, builders=OWN)
    assert loaded.get_submodule("first").weight is loaded.get_submodule("second").weight
    assert header.layers["first"].weight == header.layers["second"].weight
    assert "second.weight" not in tensors
    assert torch.equal(logits_of(loaded, images), logits_of(student, images))
    assert header.size_bytes == count(student, images[:1]).size_bytes


def test_integer_state_is_stored_and_counted(tmp_path: Path) -> None:
    student, images = student_of(TIED, [])
    student.get_buffer("order").copy_(torch.tensor([1, 0, 2, 4, 3, 5]))
    saved(student, tmp_path / "student.safetensors", TIED)
    loaded = load_student(tmp_path / "student.safetensors", builders=OWN)
    assert torch.equal(loaded.get_buffer("order"), student.get_buffer("order"))
    assert torch.equal(logits_of(loaded, images), logits_of(student, images))


STRUCTURES = [
    ["quantize.fold=before"],
    ["quantize.fold=training"],
    ["quantize.fold=before", "equalize@quantize.equalize=cross_layer"],
    ["quantize.operations.add=8"],
    ["quantize.enabled=false"],
]


@pytest.mark.parametrize("overrides", STRUCTURES, ids=" ".join)
@pytest.mark.parametrize("channels_last", [False, True])
def test_structure_of_conversion_is_built_again(overrides: list[str], channels_last: bool, tmp_path: Path) -> None:
    network = Network("qtrain.models.factory.create_model", {"name": "cifar_resnet8", "num_classes": 4, "width": 0.5})
    student, images = student_of(network, overrides, size=16)
    if channels_last:
        student.to(memory_format=torch.channels_last)
    path = tmp_path / "student.safetensors"
    size = saved(student, path, network, Images(size=(3, 16, 16)))
    loaded = load_student(path)
    assert torch.equal(logits_of(loaded, images), logits_of(student, images))
    assert size.file_bytes - size.header_bytes == count(student, images[:1]).size_bytes
    again = tmp_path / "again.safetensors"
    assert saved(loaded, again, network, Images(size=(3, 16, 16))) == size
    assert again.read_bytes() == path.read_bytes()


def test_a_full_precision_students_file_serves_as_weights_and_a_quantized_one_is_refused(tmp_path: Path) -> None:
    network = Network("qtrain.models.factory.create_model", {"name": "cifar_resnet8", "num_classes": 4, "width": 0.5})
    images = Images(size=(3, 16, 16), mean=(0.4, 0.4, 0.4), std=(0.2, 0.2, 0.2))
    saved(create_model(**network.options).eval(), tmp_path / "full.safetensors", network, images)
    saved(student_of(network, [], size=16)[0], tmp_path / "low.safetensors", network, images)
    model = create_model(**network.options, weights=str(tmp_path / "full.safetensors"))
    found = read_weight_file(tmp_path / "full.safetensors")
    assert found.normalization is not None and found.normalization.mean == images.mean
    assert torch.equal(model.conv1.weight, found.tensors["conv1.weight"])
    with pytest.raises(ValueError, match=r"low.safetensors is a quantized student, whose weights are rounded"):
        create_model(**network.options, weights=str(tmp_path / "low.safetensors"))
