"""Which layer gets what: policies by name and kind, the last match winning, and errors for what matches nothing."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from qtrain.convert.layers import Quantizable, find_layers, quant_layers
from qtrain.convert.plan import IN_FLOAT, LayerPlan, Policy, plan_layers
from qtrain.convert.swap import swap_layers
from qtrain.observers.min_max import MinMax
from qtrain.observers.moving_average import MovingAverage
from qtrain.quantizers.uniform.affine import Affine
from qtrain.quantizers.uniform.lsq import LSQ
from qtrain.spec import LayerBits, PerChannel, PerGroup, PerTensor

RECIPE = LayerPlan(weight=LSQ, input=LSQ, weight_observer=MinMax, input_observer=MinMax)


class Net(nn.Module):
    """Stem, a depthwise and a pointwise convolution, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.deep = nn.Conv2d(4, 4, 3, groups=4)
        self.point = nn.Conv2d(4, 8, 1)
        self.fc = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.point(self.deep(self.stem(x))).mean((2, 3)))


IMAGE = torch.zeros(1, 3, 8, 8)


def planned(**policies: Policy) -> dict[str, LayerPlan]:
    found = find_layers(Net(), IMAGE)
    return plan_layers(found, dict.fromkeys(found.layers, LayerBits(4, 4)), RECIPE, policies)


def test_find_layers_assigns_kinds() -> None:
    found = find_layers(Net(), IMAGE)
    assert {name: found.kinds(name) for name in found.layers} == {
        "stem": ("conv2d", "first"),
        "deep": ("conv2d", "depthwise"),
        "point": ("conv2d", "pointwise"),
        "fc": ("linear", "last"),
    }


def test_without_policies_every_layer_has_the_default_plan() -> None:
    plans = planned()
    assert all(plan.bits == (4, 4) and plan.weight is LSQ for plan in plans.values())
    found = find_layers(Net(), IMAGE)
    assert plan_layers(found, {"fc": LayerBits(2, 2)}, RECIPE)["stem"].bits == IN_FLOAT


def test_policy_changes_only_the_layers_and_settings_it_names() -> None:
    plans = planned(deep=Policy(kinds=["depthwise"], weight_bits=8, weight=Affine, input_observer=MovingAverage))
    assert plans["deep"].bits == (8, 4)
    assert plans["deep"].weight is Affine and plans["deep"].input is LSQ
    assert plans["deep"].input_observer is MovingAverage and plans["deep"].weight_observer is MinMax
    assert all(plans[name] == LayerPlan(**{**vars(RECIPE), "bits": LayerBits(4, 4)}) for name in ("stem", "point"))


def test_later_of_two_matching_policies_wins_field_by_field() -> None:
    all_layers = Policy(layers=["*"], weight_bits=3, weight=Affine)
    convolutions = Policy(kinds=["conv2d"], weight_bits=2)
    plans = planned(a=all_layers, b=convolutions)
    assert (plans["stem"].bits.weight, plans["stem"].weight) == (2, Affine)
    assert plans["fc"].bits.weight == 3
    assert planned(b=convolutions, a=all_layers)["stem"].bits.weight == 3


def test_policy_with_name_and_kind_needs_both_to_match() -> None:
    plans = planned(some=Policy(layers=["*e*"], kinds=["linear", "depthwise"], input_bits=32))
    assert [name for name, plan in plans.items() if plan.bits.input == 32] == ["deep"]


def test_granularity_alone_can_be_changed() -> None:
    model = Net()
    found = find_layers(model, IMAGE)
    recipe = LayerPlan(**{**vars(RECIPE), "weight": partial(LSQ, granularity=PerTensor())})
    policies = {"grouped": Policy(layers=["stem", "deep"], granularity=PerGroup(2))}
    swap_layers(model, found, plan_layers(found, dict.fromkeys(found.layers, LayerBits(4, 4)), recipe, policies))
    shapes = {name: tuple(layer.weight_quantizer.scale.shape) for name, layer in quant_layers(model).items()}
    assert shapes == {"stem": (2, 1, 1, 1), "deep": (2, 1, 1, 1), "point": (), "fc": ()}


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (Policy(layers=["stem", "heat"], weight_bits=8), r"policies.p: pattern 'heat' matches no layer.*; there are "),
        (Policy(layers=["fcc"], weight_bits=8), r"policies.p: pattern 'fcc' matches no layer.*did you mean 'fc'"),
        (Policy(kinds=["conv3d"], weight_bits=8), r"policies.p: no layer is of kind 'conv3d'; this model has \["),
        (Policy(layers=["fc"], kinds=["depthwise"]), r"policies.p: no layer has both a name like \['fc'\]"),
    ],
)
def test_policy_that_matches_no_layer_is_an_error_that_names_it(policy: Policy, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        planned(p=policy)


def test_pattern_matching_only_a_skipped_layer_reports_the_skip_reason() -> None:
    found = Quantizable(find_layers(Net(), IMAGE).layers, {"rnn": "the matrices are fused"}, {}, {})
    with pytest.raises(ValueError, match=r"pattern 'rnn\*' matches no layer .*only rnn \(the matrices are fused\)"):
        plan_layers(found, {}, RECIPE, {"p": Policy(layers=["rnn*"])})


def test_policy_without_layers_and_kinds_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Policy: names no layer; give layers=\[PATTERN"):
        Policy(weight_bits=8)
    with pytest.raises(ValueError, match=r"Policy: weight_bits must be 1..16, or 32 for full precision, got 0"):
        Policy(layers=["*"], weight_bits=0)


def test_error_of_a_quantizer_names_the_layer() -> None:
    model = Net()
    found = find_layers(model, IMAGE)
    recipe = LayerPlan(**{**vars(RECIPE), "weight": partial(LSQ, granularity=PerGroup(3))})
    plans = plan_layers(found, {"stem": LayerBits(4, 4)}, recipe)
    with pytest.raises(
        ValueError, match=r"layer 'stem': PerGroup: size 3 does not divide 4 output channels; use one of"
    ):
        swap_layers(model, found, plans)


def test_each_output_channel_of_a_transposed_convolution_has_its_scale() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2))
    found = find_layers(model, torch.zeros(1, 4, 5, 5))
    recipe = LayerPlan(**{**vars(RECIPE), "weight": partial(LSQ, granularity=PerChannel(0))})
    swap_layers(model, found, plan_layers(found, {"0": LayerBits(4, 4)}, recipe))
    quantizer = quant_layers(model)["0"].weight_quantizer
    assert quantizer is not None and quantizer.scale.shape == (6, 1, 1, 1)
