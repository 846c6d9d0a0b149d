"""Freezing: which layers, and that nothing moves them while the others learn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from qtrain.convert.freeze import freeze_, layers_to_freeze, weighted_layers
from qtrain.nn import QuantConv, QuantLinear
from qtrain.nn.project import project_weights_
from qtrain.quantizers.uniform.lsq import LSQ
from qtrain.quantizers.wrappers.prox_quant import ProxQuant
from qtrain.quantizers.wrappers.quant_noise import QuantNoise
from qtrain.spec import QuantSpec
from qtrain.training.optim import parameter_groups

METRICS_PREFIX = {"0": 0.3, "2": 0.1, "5": 0.2}


def student(make: Any = LSQ) -> nn.Sequential:
    """Quantized layers "0", "2" and "5", a batch norm "1", and a head "6" in full precision."""
    torch.manual_seed(0)
    layers: list[Any] = [
        QuantConv(source=nn.Conv2d(1, 4, 3)), QuantConv(source=nn.Conv2d(4, 2, 1)), QuantLinear(source=nn.Linear(8, 3))
    ]  # fmt: skip
    for layer in layers:
        layer.weight_quantizer = make(spec=QuantSpec(bits=4, shape=tuple(layer.weight.shape)))
        layer.input_quantizer = LSQ(spec=QuantSpec(bits=4))
        for quantizer in layer.modules():
            if isinstance(quantizer, LSQ):
                nn.init.constant_(quantizer.scale, 0.2)
    return nn.Sequential(
        layers[0], nn.BatchNorm2d(4), layers[1], nn.ReLU(), nn.Flatten(), layers[2], nn.Linear(3, 3)
    ).train()


@pytest.mark.parametrize(
    ("chosen", "names"),
    [
        ({"patterns": ["0"]}, ["0"]),
        ({"patterns": ["[256]"]}, ["2", "5", "6"]),
        ({"metrics": METRICS_PREFIX, "share": 1 / 3}, ["0"]),
        ({"metrics": METRICS_PREFIX, "share": 2 / 3}, ["0", "5"]),
        ({"metrics": METRICS_PREFIX, "share": 1.0}, ["0", "2", "5"]),
        ({"metrics": METRICS_PREFIX, "share": 0.01}, ["0"]),
        ({"metrics": METRICS_PREFIX, "share": 0.33, "patterns": ["2"]}, ["0", "2"]),
        ({}, []),
    ],
)
def test_layers_to_freeze_selects_by_pattern_and_instability(chosen: dict[str, Any], names: list[str]) -> None:
    assert layers_to_freeze(student(), **chosen) == names


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"patterns": ["fc*"]}, r"fit\.freeze\.layers: pattern 'fc\*' matches no layer with a weight"),
        ({"patterns": ["1"]}, r"pattern '1' matches no layer"),  # batch norm has no weight of two axes
        ({"share": 0.5}, r"fit\.freeze\.share: nothing is known .*\+callback@callbacks\.instability=instability"),
        ({"share": 0.0, "metrics": METRICS_PREFIX}, r"fit\.freeze\.share: must be in \(0, 1\], got 0\.0"),
        ({"share": 1.5, "metrics": METRICS_PREFIX}, r"must be in \(0, 1\], got 1\.5"),
        ({"share": 0.5, "metrics": {"0": 1.0, "2": 0.5}}, r"other layers than are quantized here \('5' is only in"),
        ({"share": 0.5, "metrics": METRICS_PREFIX | {"7": 1.0}}, r"'7' is only in one of the two"),
    ],
)
def test_layers_to_freeze_refuses_wrong_choices(chosen: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        layers_to_freeze(student(), **chosen)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("make_optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_frozen_layer_keeps_its_weight_while_others_learn(make_optimizer: Any) -> None:
    """Also an optimizer that was made before, with momentum and decay in it."""
    model = student()
    options = {"lr": 0.1, "weight_decay": 0.1} | ({"momentum": 0.9} if make_optimizer is torch.optim.SGD else {})
    before = make_optimizer(parameter_groups([model]), **options)
    x, target = torch.randn(8, 1, 4, 4), torch.arange(8) % 3

    def step(optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), target).backward()
        optimizer.step()
        project_weights_(model)

    step(before)
    freeze_(model, ["0", "6"])
    for optimizer in (before, make_optimizer(parameter_groups([model]), **options)):
        kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        step(optimizer)
        moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, kept[name])}
        assert {name for name in moved if name.startswith(("0.weight", "6.weight"))} == set()
        assert {"0.input_quantizer.scale", "1.weight", "1.running_mean", "2.weight", "6.bias"} <= moved
        assert "2.weight_quantizer.scale" in moved


def test_frozen_parameters_are_in_no_parameter_group() -> None:
    model = student()
    freeze_(model, layers_to_freeze(model, metrics=METRICS_PREFIX, share=1.0))
    held = {id(p) for group in parameter_groups([model], norm_decay=True) for p in group["params"]}
    layers: list[Any] = [model[i] for i in (0, 2, 5)]
    frozen = [parameter for layer in layers for parameter in (layer.weight, layer.weight_quantizer.scale)]
    assert not held & {id(parameter) for parameter in frozen}
    assert held == {id(p) for p in model.parameters()} - {id(p) for p in frozen}


def test_projection_does_not_change_a_frozen_weight() -> None:
    model: Any = student(make=lambda spec: ProxQuant(spec=spec, quantizer=LSQ, rate=1.0))
    freeze_(model, ["0"])
    for layer in weighted_layers(model).values():
        quantizer = getattr(layer, "weight_quantizer", None)
        if quantizer is not None:
            quantizer.begin_step_(progress=1.0, key=0)
    before = [model[i].weight.clone() for i in (0, 2)]
    project_weights_(model)
    assert torch.equal(model[0].weight, before[0])
    assert not torch.equal(model[2].weight, before[1])


def test_frozen_layer_computes_with_the_stored_values() -> None:
    """Noise over the weights ends: in training mode too, all of them are quantized."""
    model = student(make=lambda spec: QuantNoise(spec=spec, quantizer=LSQ, rate=0.5))
    conv: Any = model[0]
    conv.weight_quantizer.begin_step_(progress=0.0, key=1)
    stored = conv.weight_quantizer.quantize(conv.weight).dequantize()
    assert not torch.equal(conv.weight_quantizer(conv.weight), stored)
    freeze_(model, ["0"])
    assert torch.equal(conv.weight_quantizer(conv.weight), stored)
    assert conv.training and model[2].weight_quantizer.training  # type: ignore[union-attr]
