"""What holds for any network holds for small ones at random; see :mod:`tests.helpers.random_networks`."""

import copy
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from torch import Tensor, nn

import qtrain
from qtrain.convert.fold import fold_batchnorm_
from qtrain.convert.layers import set_quantization
from qtrain.ptq.equalize import CrossLayerEqualization
from tests.helpers.random_networks import CHANNELS, HEADS, SIZE, STEPS, RandomNetwork, Step

X = torch.randn(4, CHANNELS, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
FAST = {"weight_observer": "min_max", "input_observer": "min_max"}
at_random = settings(max_examples=20, suppress_health_check=list(HealthCheck))


def close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@at_random
@given(steps=STEPS, head=HEADS)
def test_student_of_a_random_network(steps: list[Step], head: Step) -> None:
    """Quantizers off is the original, what is counted is counted by hand, and what is loaded is what was saved."""
    model = RandomNetwork(steps=steps, head=head).eval()
    before = copy.deepcopy(model.state_dict())
    layers, macs = model.expected()
    with torch.no_grad():
        expected = model(X)
        student = qtrain.quantize(model, X, weight_bits=4, input_bits=4, **FAST)
        assert set(qtrain.describe(student).layers) == layers
        assert qtrain.cost(model, X).macs == qtrain.cost(student, X).macs == macs
        quantized = student(X)
        set_quantization(student, enabled=False)
        assert torch.equal(student(X), expected)
        set_quantization(student, enabled=True)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        with TemporaryDirectory() as folder:
            options = {"steps": steps, "head": head}
            file = Path(folder) / "student.safetensors"
            sizes = qtrain.save(student, file, builder=RandomNetwork, options=options)
            loaded = qtrain.load(file, builders=[RandomNetwork])
        assert torch.equal(loaded(X), quantized)
        assert sizes.file_bytes - sizes.header_bytes == qtrain.cost(student, X).size_bytes


@at_random
@given(steps=STEPS, head=HEADS)
def test_folding_and_equalizing_a_random_network_keeps_its_function(steps: list[Step], head: Step) -> None:
    model = RandomNetwork(steps=steps, head=head).eval()
    with torch.no_grad():
        for conv in model.listed[::2]:  # channels of very different ranges
            conv.weight.mul_(torch.logspace(-1, 1, len(conv.weight)).reshape(-1, 1, 1, 1))
        expected = model(X)
        if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
            fold_batchnorm_(model, X[:1])
            assert close(model(X), expected)
        try:
            CrossLayerEqualization()(model, X[:1], {})
        except ValueError as error:
            assert "no channel of RandomNetwork can be scaled" in str(error)
        assert close(model(X), expected)


@at_random
@given(steps=STEPS, head=HEADS)
def test_weights_rounded_as_if_folded_keep_the_function_with_quantizers_off(steps: list[Step], head: Step) -> None:
    model = RandomNetwork(steps=steps, head=head).eval()
    assume(any(isinstance(module, nn.BatchNorm2d) for module in model.modules()))
    with torch.no_grad():
        student = qtrain.quantize(model, X, fold="training", **FAST)
        set_quantization(student, enabled=False)
        assert close(student(X), model(X))


def test_random_networks_show_what_they_should() -> None:
    """The steps above can make each kind of thing, and the expectations follow by hand."""
    steps = [
        ["conv", 0, 3, 2, True, True, False, "keyword"],
        ["conv", 0, 1, 1, False, False, True, "list"],
        ["tied", 0, 0],
        ["again", 0, 0],
        ["cat", 0, 1, True],
        ["conv", 0, 1, 1, True, False, False, "functional"],
    ]
    model = RandomNetwork(steps=steps, head=[True, False, True])
    layers, macs = model.expected()
    assert layers == {"convs.0", "convs.2", "convs.3", "fc", "fc2"}
    grouped, plain, wide = 36 * 4 * 2 * 9, 36 * 4 * 4, 36 * 4 * 8
    assert macs == 3 * grouped + 2 * plain + wide + 2 * 3 * 144
    assert model.convs[2].weight is model.convs[0].weight


@pytest.mark.parametrize("call", ["list", "reference", "functional"])
def test_convolution_that_is_called_both_ways_stays_in_float(call: str) -> None:
    steps: list[Step] = [["conv", 0, 1, 1, True, False, False, call], ["again", 1, 0]]
    model = RandomNetwork(steps=steps, head=[False, False, False])
    report = qtrain.describe(qtrain.quantize(model, X, **FAST))
    assert set(report.layers) == {"fc"} and "convs.0" in report.skipped
