"""What runs in integers is counted in the runtime's own graph, and the rival is quantized as its makers do."""

import pytest
import torch
from torch import nn

import qtrain
from qtrain.deployment.benchmark.integers import InIntegers, RuntimeLayer, in_integers
from qtrain.deployment.benchmark.rivals import EXPORT, FULL_PRECISION, RUNTIME_INT8, predicted, rivals, timed
from qtrain.deployment.onnx.write import export

SIZE = (3, 8, 8)


class Network(nn.Module):
    """Products of 8*8*8*27, 8*8*4*8 and 4*5 multiplications, ReLU6, a sum with a number, and the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.point = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.head = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.relu6(self.conv(x))
        logits: torch.Tensor = self.head(torch.sigmoid(self.point(x)).mean((2, 3)))
        return logits


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(16, *SIZE, generator=torch.Generator().manual_seed(0)) * 8


@pytest.fixture(scope="module")
def files(images: torch.Tensor) -> dict[str, bytes]:
    torch.manual_seed(0)
    model = Network().eval()
    student = qtrain.quantize(model, images, weight_bits=8, input_bits=8)
    return {EXPORT: export(student, SIZE).to_bytes(), **rivals(model, [images[:8], images[8:]], SIZE, opset=21)}


def test_full_precision_has_no_layer_in_integers_and_all_multiplications(files: dict[str, bytes]) -> None:
    found = in_integers(files[FULL_PRECISION], SIZE)
    assert (found.share, found.macs_share) == (0.0, 0.0)
    assert [layer.macs for layer in found.layers if layer.macs] == [8 * 8 * 8 * 27, 8 * 8 * 4 * 8, 4 * 5]


def test_the_export_keeps_the_layer_between_two_quantized_inputs_in_integers(files: dict[str, bytes]) -> None:
    found = in_integers(files[EXPORT], SIZE)
    (conv,) = (layer for layer in found.layers if layer.operator == "QLinearConv")
    assert conv.integer and conv.macs == 8 * 8 * 8 * 27  # with the ReLU6 inside
    assert found.operators(integer=False) == {"FusedConv": 1, "GlobalAveragePool": 1}  # the former with the sigmoid
    assert 0.5 < found.macs_share < 1.0


def test_the_runtimes_own_quantization_has_all_products_in_integers(files: dict[str, bytes]) -> None:
    found = in_integers(files[RUNTIME_INT8], SIZE)
    assert found.macs_share == 1.0
    assert found.operators(integer=True).get("QLinearGlobalAveragePool") == 1


def test_a_batch_in_codes_is_told_from_one_in_numbers() -> None:
    found = InIntegers((RuntimeLayer("a", "QLinearConv", True, 30), RuntimeLayer("b", "Conv", False, 10),
                        RuntimeLayer("c", "MaxPool", True, 0), RuntimeLayer("d", "Conv", False, 0)))  # fmt: skip
    assert (found.share, found.macs_share) == (0.5, 0.75)
    assert str(found) == "2 of 4 layers in integers, 75.0 % of multiplications; in floating point: 2 Conv"


def test_all_files_predict_and_are_timed_in_each_round(files: dict[str, bytes], images: torch.Tensor) -> None:
    classes = predicted(files, [images[:10], images[10:]], threads=1)
    assert {name: found.shape for name, found in classes.items()} == dict.fromkeys(files, (16,))
    with torch.no_grad():
        torch.manual_seed(0)
        assert classes[FULL_PRECISION].equal(Network().eval()(images).argmax(dim=1))
    times = timed(files, images[:1], rounds=3, threads=1)
    assert {name: len(seconds) for name, seconds in times.items()} == dict.fromkeys(files, 3)
