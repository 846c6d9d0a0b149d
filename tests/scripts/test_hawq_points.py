"""HAWQ-v3's published points by the cost model: layer by layer as their integer program has them, and in total."""

from collections import Counter

import pytest
import torch

from qtrain.costs.geometry import layer_geometries
from scripts.hawq_points import POINTS, allocation, network, reproduced

MILLIONS = {36864: 115605504, 73728: 57802752, 147456: 115605504, 8192: 6422528, 294912: 57802752, 589824: 115605504,
            32768: 6422528, 1179648: 57802752, 2359296: 115605504, 131072: 6422528}  # fmt: skip
"""ResNet-18's layers between the ends in their notebook: weights -> multiplications."""

UNIFORM = ("full precision", "W8A8", "W4A4")


def test_layers_of_resnet18_are_those_of_their_integer_program() -> None:
    geometries = layer_geometries(network("resnet18"), torch.zeros(1, 3, 224, 224))
    found = [one for one in geometries if one.name not in ("conv1", "fc")]
    assert len(found) == 19 and Counter(one.weights for one in found)[2359296] == 3
    assert all(one.macs == MILLIONS[one.weights] for one in found)


def test_each_layer_has_the_bits_of_its_block() -> None:
    geometries = layer_geometries(network("resnet18"), torch.zeros(1, 3, 224, 224))
    (point,) = [one for one in POINTS if (one.model, one.name) == ("resnet18", "medium size")]
    bits = allocation(point, geometries)
    assert [bits[name].weight for name in ("conv1", "layer4.0.conv1", "layer4.0.conv2")] == [8, 8, 4]
    assert [bits[name].input for name in ("layer4.0.downsample.0", "layer4.1.conv1", "fc")] == [8, 4, 8]


def test_published_points_are_reproduced() -> None:
    for point, mb, gbops in reproduced():
        if point.name in UNIFORM:
            assert mb == pytest.approx(point.mb, rel=0.01), point
            assert gbops == pytest.approx(point.gbops, rel=0.01, abs=1), point  # whole numbers, of which 34 is one
        else:
            assert mb == pytest.approx(point.mb, rel=0.033), point
            assert gbops == pytest.approx(point.gbops, rel=0.033), point
