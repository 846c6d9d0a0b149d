"""The gate notices every fault that is planted in a file, and names the layer."""

from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

import qtrain
from qtrain.deployment.integer import operators
from qtrain.deployment.onnx.write import export
from qtrain.deployment.parity.compare import Difference, Rounded, difference
from qtrain.deployment.parity.verify import verify
from tests.deployment.onnx.networks import network
from tests.deployment.onnx.test_write import FAST, SIZE, images

Change = Callable[[np.ndarray], np.ndarray]


@pytest.fixture(scope="module")
def made() -> nn.Module:
    torch.manual_seed(0)
    return qtrain.quantize(network("residual").eval(), images(), weight_bits=4, input_bits=4, options=FAST)


@pytest.fixture(scope="module")
def file(made: nn.Module) -> bytes:
    return export(made, SIZE).to_bytes()


def changed(file: bytes, name: str, change: Change) -> bytes:
    """``file`` with ``change`` done to the constant ``name``."""
    model = onnx.load_from_string(file)
    for tensor in model.graph.initializer:
        if tensor.name == name:
            tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor).copy()), name))
            return model.SerializeToString()
    raise AssertionError(f"{name} is no constant: {[tensor.name for tensor in model.graph.initializer]}")


def one_more(values: np.ndarray) -> np.ndarray:
    values.reshape(-1)[0] += 1
    return values


def one_ulp(values: np.ndarray) -> np.ndarray:
    values.reshape(-1)[0] = np.nextafter(values.reshape(-1)[0], np.float32(np.inf))
    return values


def test_an_untouched_file_passes(made: nn.Module, file: bytes) -> None:
    verdict = verify(made, [images(8), images(4)], SIZE, file)
    assert verdict.passed and verdict.images == 12
    assert [tier.name for tier in verdict.tiers] == [
        "constants", "reference", "reference of the file", "onnxruntime, unoptimized", "onnxruntime",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("body.conv1.weight.codes", one_more),
        ("body.conv1.weight.scale", one_ulp),
        ("body.conv1.input.scale", one_ulp),
        ("head.bias.codes", one_more),
        ("body.conv1.weight.DequantizeLinear.zero_point", one_more),
    ],
)
def test_a_changed_constant_is_found_and_named(made: nn.Module, file: bytes, name: str, change: Change) -> None:
    verdict = verify(made, [images(4)], SIZE, changed(file, name, change))
    assert not verdict.passed
    (fault,) = verdict.tiers[0].faults
    assert fault.startswith(name)


def test_a_changed_operation_is_found_and_named(made: nn.Module, file: bytes) -> None:
    model = onnx.load_from_string(file)
    node = next(node for node in model.graph.node if node.op_type == "Relu")
    node.op_type = "Abs"
    tiers = {tier.name: tier for tier in verify(made, [images(4)], SIZE, model.SerializeToString()).tiers}
    assert tiers["constants"].faults[0].startswith(f"{node.name}: the file computes something else")
    assert tiers["reference"].faults == []
    assert tiers["reference of the file"].faults == [f"{node.name}: Abs has no integer form"]


def test_another_rounding_is_found_and_the_layer_named(made: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = operators.multiplied

    def down(numbers: Tensor, factor: Tensor, bound: int) -> Tensor:
        return torch.div(exact(2 * numbers, factor, 2 * bound), 2, rounding_mode="floor")

    monkeypatch.setattr(operators, "multiplied", down)
    verdict = verify(made, [images(8)], SIZE)
    assert not verdict.passed
    assert verdict.tiers[1].faults[0].startswith("body.conv1: ")


@pytest.mark.parametrize("data", [b"", b"no model", b"\x08\x0a\x12", bytes(500)])
def test_a_file_that_is_no_model_ends_in_one_line(made: nn.Module, data: bytes) -> None:
    with pytest.raises(ValueError) as caught:
        verify(made, [images(4)], SIZE, data)
    assert str(caught.value).isprintable()


def test_a_truncated_file_ends_in_one_line(made: nn.Module, file: bytes) -> None:
    for length in range(0, len(file), len(file) // 7):
        with pytest.raises(ValueError) as caught:
            verify(made, [images(4)], SIZE, file[:length])
        assert str(caught.value).isprintable()


def test_differences_are_told_apart_by_their_cause() -> None:
    expected = Rounded(torch.tensor([1, 2, 3, 4]), torch.tensor([0.3, 0.0005, 0.3, 0.3]))
    from_file = Rounded(torch.tensor([1, 2, 4, 4]), torch.tensor([0.3, 0.3, 0.3, 0.3]))
    found = difference("conv", expected, torch.tensor([1, 3, 4, 6]), from_file)
    assert found == Difference("conv", elements=4, differing=3, steps=2, ties=1, biased=1)
    assert found.unexplained == 1
    assert found.cause == "1 ties at a half, 1 by biases in 32 bits, 1 for no known reason"
    assert (found + found).differing == 6
