"""Weights that a quantizer moves before or after a step, in whatever layout their layer keeps them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qtrain.nn import QuantConv, QuantConvTranspose, QuantEmbedding, QuantLinear
from qtrain.nn.conv_transpose import outputs_first
from qtrain.nn.project import partition_weights_, project_weights_
from qtrain.quantizers.base import Quantizer
from qtrain.quantizers.binary.binary_connect import BinaryConnect
from qtrain.quantizers.hooks import begin_step_
from qtrain.quantizers.uniform.affine import Affine
from qtrain.quantizers.uniform.lsq import LSQ
from qtrain.quantizers.wrappers.incremental import Incremental
from qtrain.quantizers.wrappers.prox_quant import ProxQuant
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


@pytest.mark.parametrize("name", LAYERS)
def test_each_kind_of_layer_is_partitioned_before_a_step(name: str) -> None:
    """Steps of one, the half with the largest magnitudes: rounded in place, the rest as it was."""
    kind, source = LAYERS[name]
    layer: Any = kind(source=source)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(0)) * 3)
    before = layer.weight.detach().clone()
    spec = QuantSpec(bits=8, shape=tuple(layer.effective_weight().shape), signed=True)
    layer.weight_quantizer = Incremental(spec=spec, quantizer=Affine, share=0.5)
    model = nn.Sequential(layer)
    partition_weights_(model)
    assert torch.equal(layer.weight, before), "not due before a step begins"
    begin_step_(model, seed=0, step=0, progress=0.0)
    partition_weights_(model)
    large = before.abs() > before.abs().median()
    assert torch.equal(layer.weight, torch.where(large, before.round(), before))
    with torch.no_grad():
        layer.weight.add_(1.0)
    project_weights_(model)
    assert torch.equal(layer.weight, torch.where(large, before.round(), before + 1.0))


def test_a_weight_that_learns_nothing_is_not_partitioned() -> None:
    layer: Any = QuantLinear(source=nn.Linear(4, 6))
    layer.weight_quantizer = Incremental(spec=QuantSpec(bits=8, shape=(6, 4), signed=True), quantizer=Affine, share=1.0)
    layer.weight.requires_grad_(False)
    begin_step_(layer, seed=0, step=0, progress=0.0)
    partition_weights_(layer)
    assert not layer.weight_quantizer.frozen.any()


def test_a_standardized_weight_has_no_part_to_set() -> None:
    layer = QuantConv(source=nn.Conv2d(4, 6, 3), weight_transform=nn.Identity())
    spec = QuantSpec(bits=8, shape=(6, 4, 3, 3), signed=True)
    layer.weight_quantizer = Incremental(spec=spec, quantizer=Affine, share=0.5)
    model = nn.Sequential(layer)
    begin_step_(model, seed=0, step=0, progress=0.0)
    with pytest.raises(ValueError, match=r"layer '0': Incremental: the weight is standardized .* another quantizer"):
        partition_weights_(model)


def test_a_shared_weight_is_moved_once() -> None:
    """A proximal step moves a weight a part of the way, so that two steps would move it further."""
    layers = [QuantLinear(source=nn.Linear(6, 6)) for _ in range(2)]
    layers[1].weight = layers[0].weight
    quantizer = ProxQuant(spec=QuantSpec(bits=2, shape=(6, 6), signed=True), quantizer=LSQ, rate=0.02)
    for layer in layers:
        layer.weight_quantizer = quantizer
    expected = quantizer.project(layers[0].weight.detach().clone())
    assert not torch.equal(quantizer.project(expected), expected), "twice is another weight"
    project_weights_(nn.Sequential(*layers))
    assert torch.equal(layers[0].weight, expected)
