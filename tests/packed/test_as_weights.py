"""A student's file where weights are asked for: those of full precision serve, rounded ones are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from qtrain.models.factory import create_model
from qtrain.models.weight_file import read_weight_file
from qtrain.packed.header import Images, Network
from qtrain.packed.save import save_student
from tests.packed.students import student_of

NETWORK = Network("qtrain.models.factory.create_model", {"name": "cifar_resnet8", "num_classes": 4, "width": 0.5})
IMAGES = Images(size=(3, 16, 16), mean=(0.4, 0.4, 0.4), std=(0.2, 0.2, 0.2))


def saved(student: nn.Module, path: Path) -> Path:
    save_student(student, path, network=NETWORK, images=IMAGES)
    return path


def test_a_full_precision_student_serves_as_weights_with_its_normalization(tmp_path: Path) -> None:
    path = saved(create_model(**NETWORK.options).eval(), tmp_path / "full.safetensors")
    model = create_model(**NETWORK.options, weights=str(path))
    found = read_weight_file(path)
    assert found.normalization is not None and found.normalization.mean == IMAGES.mean
    assert torch.equal(model.get_submodule("conv1").weight, found.tensors["conv1.weight"])


def test_a_quantized_student_is_refused_as_weights(tmp_path: Path) -> None:
    student, _ = student_of(NETWORK, [], size=16)
    path = saved(student, tmp_path / "low.safetensors")
    with pytest.raises(ValueError, match=r"low.safetensors is a quantized student, whose weights are rounded"):
        create_model(**NETWORK.options, weights=str(path))
