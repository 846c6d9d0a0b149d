"""A student for ONNX Runtime stays in integers from the image to the logits, and computes what was trained."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import pytest
import timm
import torch
from timm.layers import ConvNormAct
from torch import nn

import qtrain
from qtrain.deployment.onnx.write import export
from qtrain.deployment.parity.verify import verify
from tests.deployment.onnx.networks import BODIES, network

ort = pytest.importorskip("onnxruntime")

SIZE = (3, 32, 32)
FAST = {"weight_observer": "min_max", "input_observer": "min_max"}


def resnet() -> nn.Module:
    """A ResNet-10 with a stem that pools, whose branches are not folded away."""
    torch.manual_seed(0)
    model = timm.create_model("resnet18", layers=[1, 1, 1, 1], num_classes=5, channels=(8, 16, 16, 16)).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


def kernels(model: bytes, folder: Path) -> Counter[str]:
    """The operators that ONNX Runtime makes of ``model``."""
    options = ort.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(folder / "optimized.onnx"), 3
    ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_residual_network_runs_in_integers_alone(bits: int, tmp_path: Path) -> None:
    model, images = resnet(), torch.randn(4, *SIZE)
    student = qtrain.quantize(model, images, weight_bits=bits, input_bits=bits, target="onnxruntime", **FAST)
    data = export(student, SIZE).to_bytes()
    found = kernels(data, tmp_path)
    assert found["QLinearConv"] == sum(isinstance(m, nn.Conv2d) for m in model.modules())
    assert (found["QLinearAdd"], found["QLinearGlobalAveragePool"], found["QGemm"]) == (4, 1, 1)
    assert found["NhwcMaxPool"] + found["MaxPool"] == 1
    assert not {"Conv", "FusedConv", "Add", "Relu", "Gemm", "GlobalAveragePool", "ReduceMean"} & found.keys()
    verdict = verify(student, [images], SIZE, data)
    assert verdict.passed, [tier.faults for tier in verdict.tiers]


def test_every_tensor_of_codes_is_compared() -> None:
    """A tensor that is quantized for two readers, and again for one of them, is compared at both places."""
    images = torch.randn(2, *SIZE)
    student = qtrain.quantize(resnet(), images, weight_bits=4, input_bits=4, target="onnxruntime", **FAST)
    made = export(student, SIZE)
    quantized = {node.name for node in made.exact.graph if node.op_type == "QuantizeLinear"}
    read = {str(value).removesuffix(".Clip").removesuffix(".QuantizeLinear") for value in made.codes.values()}
    assert {str(name).removesuffix(".QuantizeLinear") for name in quantized} == read
    assert any(call.endswith(".tensor") for call in made.codes)


@pytest.mark.parametrize("activation", ["hard_swish", "hard_sigmoid", "sigmoid"])
def test_codes_read_by_an_activation_inside_a_norm_are_compared_under_its_name(activation: str) -> None:
    """timm's norms hold the activation behind them; a layer that takes in such a norm leaves the activation."""
    torch.manual_seed(0)
    model = nn.Sequential(
        ConvNormAct(3, 8, 3, act_layer=activation), ConvNormAct(8, 8, 3, act_layer=activation, drop_layer=nn.Dropout),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    ).eval()  # fmt: skip
    images = torch.randn(4, 3, 8, 8)
    student = qtrain.quantize(model, images, weight_bits=7, input_bits=8, target="onnxruntime", **FAST)
    made = export(student, (3, 8, 8))
    quantized = {str(node.name) for node in made.exact.graph if node.op_type == "QuantizeLinear"}
    assert quantized <= {str(value).replace(".Clip", ".QuantizeLinear") for value in made.codes.values()}
    inside = {call for call in made.codes if ".bn.act" in call}
    assert len(inside) == 2, made.codes
    verdict = verify(student, [images], (3, 8, 8), made.to_bytes())
    assert verdict.passed, [tier.faults for tier in verdict.tiers]
    assert all(inside <= tier.layers.keys() for tier in verdict.tiers[1:])


def test_without_a_target_sums_are_computed_in_floating_point(tmp_path: Path) -> None:
    images = torch.randn(4, *SIZE)
    student = qtrain.quantize(resnet(), images, weight_bits=8, input_bits=8, **FAST)
    found = kernels(export(student, SIZE).to_bytes(), tmp_path)
    assert found["Add"] == 4 and found["QLinearAdd"] == 0


def test_norms_alone_stay_in_floating_point_and_all_beside_them_runs_in_integers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, images = network("norms").eval(), torch.randn(4, 3, 8, 8)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    student = qtrain.quantize(model, images, weight_bits=8, input_bits=8, target="onnxruntime", **FAST)
    data = export(student, (3, 8, 8)).to_bytes()
    found = kernels(data, tmp_path)
    assert (found["BatchNormalization"], found["LayerNormalization"]) == (2, 1)
    assert (found["QLinearConv"], found["QLinearAdd"], found["QLinearConcat"]) == (6, 2, 1)
    assert not {"Conv", "FusedConv", "Add", "Concat", "Gemm"} & found.keys()
    verdict = verify(student, [images], (3, 8, 8), data)
    assert verdict.passed, [tier.faults for tier in verdict.tiers]
    assert {layer.differing for tier in verdict.tiers for layer in tier.layers.values()} == {0}


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("body", BODIES)
def test_a_target_changes_nothing_of_what_is_proved(body: str, target: str) -> None:
    torch.manual_seed(0)
    images = torch.randn(3, 3, 8, 8)
    student = qtrain.quantize(network(body).eval(), images, weight_bits=4, input_bits=4, target=target, **FAST)
    verdict = verify(student, [images], (3, 8, 8))
    assert verdict.passed, [tier.faults for tier in verdict.tiers]
