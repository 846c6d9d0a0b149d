"""Shapes of layers: read from a forward, and enough to say how often each of them multiplies."""

import math

import pytest
import torch
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn

from qtrain.costs.count import OUTSIDE_LAYERS, count
from qtrain.costs.geometry import layer_geometries
from qtrain.nn import QuantConv


class Net(nn.Module):
    """A strided convolution, a depthwise one, a linear layer that is called twice, and one that is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False)
        self.fc = nn.Linear(4, 4)
        self.idle = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.fc(self.depthwise(self.stem(x)).mean((2, 3))))


def test_geometry_of_each_layer_by_hand() -> None:
    stem, depthwise, fc, idle = layer_geometries(Net(), torch.zeros(2, 3, 8, 8))
    assert (stem.name, stem.kind, stem.weight_shape, stem.groups, stem.bias) == (
        "stem",
        "conv2d",
        (4, 3, 3, 3),
        1,
        True,
    )
    assert (stem.inputs, stem.outputs, stem.macs) == (3 * 64, 4 * 16, 16 * 4 * 27)
    assert (stem.input_shape, stem.output_shape) == ((3, 8, 8), (4, 4, 4))
    assert (stem.stride, stem.padding) == ((2, 2), ((1, 1), (1, 1)))
    assert (depthwise.groups, depthwise.macs, depthwise.bias) == (4, 16 * 4 * 9, False)
    assert (fc.inputs, fc.outputs, fc.macs) == (8, 8, 32), "two calls for one image"
    assert (fc.input_shape, fc.output_shape) == ((4,), (4,)), "of the first call"
    assert (idle.macs, idle.inputs, idle.input_shape, idle.weights) == (0, 0, (), 4)
    assert sum(one.share for one in (stem, depthwise, fc, idle)) == pytest.approx(1)


def test_macs_equal_a_loop_over_all_taps() -> None:
    geometries = layer_geometries(Net(), torch.zeros(1, 3, 8, 8))
    for one in geometries[:2]:
        outputs, inputs, height, width = one.weight_shape
        taps = 0
        for _ in range(outputs):
            for _ in range(math.prod(one.output_shape[1:])):
                taps += sum(1 for _ in range(inputs) for _ in range(height) for _ in range(width))
        assert one.macs == taps


def test_a_tied_weight_belongs_to_the_first_of_its_layers() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    first, second = layer_geometries(model, torch.zeros(1, 6))
    assert (first.weights, second.weights, second.weight_shape) == (36, 0, (6, 6))


def test_padding_that_follows_from_the_image_is_given_in_zeros() -> None:
    model = nn.Sequential(
        Conv2dSame(3, 4, 3, stride=2), nn.Conv2d(4, 4, 3, padding="same"), nn.Conv2d(4, 4, 2, stride=2)
    )
    same, text, none = layer_geometries(model, torch.zeros(1, 3, 8, 8))
    assert same.padding == ((0, 1), (0, 1)), "the odd zero at the end"
    assert text.padding == ((1, 1), (1, 1))
    assert none.padding == ((0, 0), (0, 0))


def test_a_converted_layer_has_the_geometry_of_its_source() -> None:
    model = Net()
    before = layer_geometries(model, torch.zeros(1, 3, 8, 8))
    model.stem = QuantConv(source=model.stem)  # type: ignore[assignment]
    assert layer_geometries(model, torch.zeros(1, 3, 8, 8)) == before


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        q = self.project(x)
        return (q @ q.transpose(1, 2)).softmax(-1) @ x


def test_products_outside_layers_come_last_and_all_macs_are_those_of_the_count() -> None:
    example = torch.zeros(3, 6, 4)
    geometries = layer_geometries(Attention(), example)
    assert [one.name for one in geometries] == ["project", OUTSIDE_LAYERS]
    assert sum(one.macs for one in geometries) == count(Attention(), example).macs


class Several(nn.Conv2d):
    """Reads a tuple and gives a dict, as layers with a forward of their own may."""

    def forward(self, input: tuple[Tensor, Tensor]) -> dict[str, Tensor]:  # type: ignore[override]
        output = super().forward(input[0] + input[1])
        return {"all": output, "mean": output.mean((2, 3))}


class ReadsSeveral(nn.Module):
    """A layer of its own kind and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = Several(3, 4, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv((x, x))["mean"])


def test_all_tensors_that_a_layer_reads_and_gives_count() -> None:
    conv, head = layer_geometries(ReadsSeveral(), torch.zeros(2, 3, 8, 8))
    assert (conv.inputs, conv.outputs, conv.macs) == (2 * 3 * 64, 4 * 36 + 4, 36 * 4 * 27)
    assert (conv.input_shape, conv.output_shape) == ((3, 8, 8), (4, 6, 6))
    assert (head.inputs, head.outputs) == (4, 2)
