"""Weights that a quantizer moves after each step, in whatever layout their layer keeps them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qtrain.nn import QuantConv, QuantConvTranspose, QuantEmbedding, QuantLinear
from qtrain.nn.conv_transpose import outputs_first
from qtrain.nn.project import project_weights_
from qtrain.quantizers.base import Quantizer
from qtrain.quantizers.binary_connect import BinaryConnect
from qtrain.quantizers.lsq import LSQ
from qtrain.spec import QuantSpec

LAYERS = {
    "conv": (QuantConv, nn.Conv2d(4, 6, 3)),
    "transposed": (QuantConvTranspose, nn.ConvTranspose2d(4, 6, 3, groups=2)),
    "linear": (QuantLinear, nn.Linear(4, 6)),
    "embedding": (QuantEmbedding, nn.Embedding(6, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_each_kind_of_layer_is_projected(name: str) -> None:
    kind, source = LAYERS[name]
    layer = kind(source=source)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(0)) * 3)
    expected = layer.weight.detach().clamp(-1, 1)
    spec = QuantSpec(bits=1, shape=tuple(layer.effective_weight().shape), signed=True)
    layer.weight_quantizer = BinaryConnect(spec=spec)
    identity = id(layer.weight)
    project_weights_(nn.Sequential(layer))
    assert torch.equal(layer.weight, expected)
    assert id(layer.weight) == identity, "an optimizer holds the parameter"


def test_other_weights_stay() -> None:
    layer = QuantLinear(source=nn.Linear(4, 6))
    quantizer: Quantizer = LSQ(spec=QuantSpec(bits=4, shape=(6, 4), signed=True))
    layer.weight_quantizer = quantizer
    before: Tensor = layer.weight.detach().clone()
    project_weights_(nn.Sequential(layer, nn.Linear(6, 2)))
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("groups", [1, 2])
def test_outputs_first_is_its_own_inverse(groups: int) -> None:
    weight = torch.randn(4, 6 // groups, 3, 2)
    moved = outputs_first(weight, groups)
    assert moved.shape == (6, 4 // groups, 3, 2)
    assert torch.equal(outputs_first(moved, groups), weight)
    if groups == 1:
        assert torch.equal(moved, weight.transpose(0, 1))
