"""Layers alone in a file: they compute the layer's shape, in integers, and their times leave out the file's ends."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from qtrain.costs.geometry import layer_geometries
from qtrain.costs.latency_table import LayerShape
from qtrain.deployment.benchmark.integers import in_integers
from qtrain.deployment.onnx.write import export
from qtrain.deployment.parity.runtimes import OnnxRuntime
from qtrain.deployment.profile.layer_file import can_stand_alone, layer_file
from qtrain.deployment.profile.measure import Runs, is_end, layer_times, multiplies, time_of_rest
from qtrain.deployment.profile.sessions import WARM_UP, times_of_each
from qtrain.spec import LayerBits

KINDS = {
    "strided": nn.Conv2d(3, 4, 3, stride=2, padding=1),
    "depthwise": nn.Conv2d(3, 3, 5, padding=2, groups=3),
    "linear": nn.Linear(8, 5),
    "transposed": nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1),
}


def shape_of(layer: nn.Module) -> LayerShape:
    (geometry,) = layer_geometries(nn.Sequential(layer), torch.zeros(2, 3, 8, 8))
    return LayerShape.of(geometry)


def float_file(network: nn.Module, *size: int) -> bytes:
    return export(network.eval(), size, opset=21, batch=1).to_bytes()


@pytest.mark.parametrize("bits", [LayerBits(8, 8), LayerBits(32, 32)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_alone_gives_what_the_layer_gives_in_the_network(kind: str, bits: LayerBits) -> None:
    shape = shape_of(KINDS[kind])
    file = layer_file(shape, bits, opset=21)
    found = OnnxRuntime(file)({"images": torch.rand(1, *shape.input_shape)})["logits"]
    assert tuple(found.shape) == (1, *shape.output_shape[:-1], 1), "a column, so that writing it takes no time"
    layers = in_integers(file, shape.input_shape)
    integers = bits.weight == 8 and kind != "transposed"  # ONNX Runtime has no integers for transposed convolutions
    assert [one.integer for one in layers.layers if one.macs] == [integers]
    assert sum(one.macs for one in layers.layers) == math.prod(shape.weight_shape[1:]) * math.prod(
        shape.input_shape if kind == "transposed" else shape.output_shape
    )


@pytest.mark.parametrize("bits", [LayerBits(8, 8), LayerBits(32, 32)], ids=str)
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_of_a_layer_alone_only_its_product_counts(runtime: str, bits: LayerBits) -> None:
    shape = shape_of(nn.Conv2d(3, 16, 3, padding=1))
    session = Runs(runtime, threads=1, rounds=1, opset=21).session(layer_file(shape, bits, opset=21), profiled=True)
    for _ in range(WARM_UP + 1):
        session.run(np.zeros((1, *shape.input_shape), dtype=np.float32))
    (kernel,) = [one for name, one in session.kernels().items() if not is_end(name, one.operator)]
    assert multiplies(kernel.operator)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_times_of_a_network_are_those_of_its_shapes(runtime: str) -> None:
    network = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1), nn.Embedding(2, 2))
    network.forward = lambda x: network[1](network[0](x))  # type: ignore[method-assign]
    geometries = layer_geometries(network, torch.zeros(1, 3, 32, 32))
    runs = Runs(runtime, threads=1, rounds=3, opset=21)
    found = layer_times(geometries, LayerBits(8, 8), runs, network=float_file(network, 3, 32, 32), size=(3, 32, 32))
    assert 0 < found.whole.low <= found.whole.median <= found.whole.high
    assert list(found.times) == [LayerShape.of(geometries[0])] == [LayerShape.of(geometries[1])], "one shape"
    assert not found.failed
    for time in found.times.values():
        assert 0 <= time.low <= time.us <= time.high
    assert not can_stand_alone(LayerShape.of(geometries[2]))


def test_a_kernel_that_is_too_fast_for_the_clock_in_some_runs_took_no_time_there() -> None:
    fast, slow = ("add", "Eltwise"), ("conv", "Convolution")
    assert times_of_each([{slow: 8.0}, {fast: 1.0, slow: 9.0}, {slow: 7.0}]) == {
        slow: [8.0, 9.0, 7.0],
        fast: [0.0, 1.0, 0.0],
    }
    assert times_of_each([]) == {}


def test_a_layer_that_the_runtime_refuses_is_said_with_the_reason() -> None:
    network = nn.Sequential(nn.Linear(8, 5))
    geometries, runs = layer_geometries(network, torch.zeros(1, 8)), Runs("onnxruntime", threads=1, rounds=2, opset=17)
    found = layer_times(geometries, LayerBits(8, 8), runs, network=float_file(network, 8), size=(8,))
    assert not found.times and "opset" in next(iter(found.failed.values()))


def test_the_rest_of_a_network_is_not_more_than_the_whole() -> None:
    file = layer_file(shape_of(nn.Conv2d(3, 64, 5, padding=2)), LayerBits(32, 32), opset=21)
    runs = Runs("onnxruntime", threads=1, rounds=5, opset=21)
    whole = layer_times([], LayerBits(32, 32), runs, network=file, size=(3, 8, 8)).whole
    assert time_of_rest(file, (3, 8, 8), runs) > 0 and whole.low <= whole.median <= whole.high


@pytest.mark.parametrize(
    ("operator", "product"),
    [("QLinearConv", True), ("FusedGemm", True), ("FullyConnected", True), ("QLinearAdd", False), ("Convert", False)],
)
def test_products_are_known_by_their_operator(operator: str, product: bool) -> None:
    assert multiplies(operator) is product
