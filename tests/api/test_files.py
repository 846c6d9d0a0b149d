"""``qtrain.save``, ``qtrain.load`` and ``qtrain.cost`` for networks of one's own and of timm."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import qtrain
from qtrain.packed.header import read
from tests.api.test_quantize import Net, images


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(images())
    return result


def test_a_class_without_arguments_needs_no_builder(tmp_path: Path) -> None:
    student = qtrain.quantize(Net(), images())
    path = tmp_path / "student.safetensors"
    size = qtrain.save(student, path, classes=["a", "b", "c", "d"], mean=[0.5] * 3, std=[0.25] * 3)
    assert size.file_bytes == path.stat().st_size == size.header_bytes + qtrain.cost(student, images()).size_bytes
    assert read(path)[0].images.classes == ("a", "b", "c", "d")
    for builders in ([Net], ["tests.api.test_quantize.Net"], ["tests"]):
        assert torch.equal(logits(qtrain.load(path, builders=builders)), logits(student))


def test_code_of_ones_own_is_not_run_unasked(tmp_path: Path) -> None:
    qtrain.save(qtrain.quantize(Net(), images()), tmp_path / "student.safetensors")
    with pytest.raises(ValueError, match=r"tests.api.test_quantize.Net is code of your own.*builders=\['tests'\]"):
        qtrain.load(tmp_path / "student.safetensors")


def test_arguments_are_said_by_builder_and_options(tmp_path: Path) -> None:
    student = qtrain.quantize(Net(width=6), images())
    with pytest.raises(ValueError, match=r"save: how a Net is built is not known \(.*give builder=... and its options"):
        qtrain.save(student, tmp_path / "student.safetensors")
    assert not list(tmp_path.iterdir())
    qtrain.save(student, tmp_path / "student.safetensors", builder=Net, options={"width": 6})
    assert torch.equal(logits(qtrain.load(tmp_path / "student.safetensors", builders=[Net])), logits(student))


def test_a_network_of_timm_needs_no_builder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    student = qtrain.quantize(timm.create_model("resnet10t", num_classes=4), images())
    qtrain.save(student, tmp_path / "student.safetensors")
    assert torch.equal(logits(qtrain.load(tmp_path / "student.safetensors")), logits(student))


def test_the_size_of_images_must_be_known_for_an_unquantized_network(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the size of the images is not known; give size="):
        qtrain.save(Net(), tmp_path / "model.safetensors")
    qtrain.save(Net().eval(), tmp_path / "model.safetensors", size=(3, 8, 8))


def test_a_printed_cost_has_a_row_a_layer_and_the_totals() -> None:
    text = str(qtrain.cost(qtrain.quantize(Net(), images()), images()))
    assert [line.split()[0] for line in text.splitlines()] == ["layer", "conv", "middle", "head", "(outside", "total"]
