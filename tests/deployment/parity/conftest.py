"""Fixtures of the tests of the gate."""

import pytest
import torch
from torch import nn

import qtrain
from qtrain.deployment.onnx.write import export
from tests.deployment.onnx.networks import network
from tests.deployment.onnx.test_write import FAST, SIZE, images


@pytest.fixture(scope="session")
def with_norms() -> tuple[nn.Module, bytes]:
    """A student with a depthwise layer, norms that no layer takes in, a concatenation and sums, and its file."""
    torch.manual_seed(0)
    model = network("norms").eval()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
    student = qtrain.quantize(model, images(), weight_bits=4, input_bits=4, target="onnxruntime", options=FAST)
    return student, export(student, SIZE).to_bytes()
