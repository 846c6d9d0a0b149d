"""From a config node to an object: nesting, partials, live arguments, and whose fault an error is."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from qtrain.config.compose import compose
from qtrain.config.instantiate import component
from qtrain.quantizers.uniform.lsq import LSQ
from qtrain.settings.component import Component, built
from qtrain.spec import PerChannel, QuantSpec
from qtrain.utils.errors import ConfigError

QUANTIZER = {
    "_target_": "qtrain.quantizers.uniform.lsq.LSQ",
    "_partial_": True,
    "granularity": {"_target_": "qtrain.spec.granularity.PerChannel", "axis": 0},
}


def test_partial_is_completed_later_and_its_nested_components_are_built() -> None:
    made = component(QUANTIZER).build()
    assert isinstance(made, partial)
    quantizer = made(spec=QuantSpec(bits=4, shape=(8, 3, 3, 3)))
    assert isinstance(quantizer, LSQ)
    assert quantizer.granularity == PerChannel(axis=0)
    assert quantizer.scale.shape == (8, 1, 1, 1)


def test_each_build_gives_a_new_object() -> None:
    objective = compose(["objective=soft_hint", "teacher=cifar_resnet20"]).objective
    one, two = objective.build(), objective.build()
    assert one is not two
    assert one.terms["hint"] is not two.terms["hint"]


def test_live_arguments_arrive_as_the_same_objects() -> None:
    weight = nn.Parameter(torch.zeros(3))
    optimizer = component({"_target_": "torch.optim.SGD", "lr": 0.5, "_partial_": True}).build(
        params=[weight], lr=0.25
    )()
    assert optimizer.param_groups[0]["params"][0] is weight
    assert optimizer.param_groups[0]["lr"] == 0.25


def test_other_options_change_what_is_built_and_what_it_is_known_by() -> None:
    """The plain node identifies kept weights, so it must say what was built."""
    one = component({"_target_": "qtrain.spec.granularity.PerChannel", "axis": 0})
    other = one.with_options(axis=1)
    assert (one.build(), other.build()) == (PerChannel(axis=0), PerChannel(axis=1))
    assert (one.plain["axis"], other.plain["axis"]) == (0, 1)


def test_containers_without_a_target_are_built_element_by_element() -> None:
    axis = component({"_target_": "qtrain.spec.granularity.PerChannel", "axis": 1})
    made = built({"axis": [axis, 5], "note": "plain"})
    assert made == {"axis": [PerChannel(axis=1), 5], "note": "plain"}
    assert type(made) is dict
    assert type(made["axis"]) is list


def test_interpolations_reach_outside_the_node() -> None:
    assert compose(["seed=7"]).data.options["seed"] == 7


def test_constructors_own_rule_is_reported_with_the_key() -> None:
    spec = component({"_target_": "qtrain.spec.QuantSpec", "bits": 99}, key="deep.spec")
    with pytest.raises(ConfigError, match=r"^deep\.spec: QuantSpec: bits must be in 1\.\.16, got 99"):
        spec.build()


def test_targets_that_are_not_admitted_are_refused_where_they_stand() -> None:
    with pytest.raises(ConfigError, match=r"^inner\._target_: 'os\.system' is not admitted"):
        component({"_target_": "os.system", "command": "true"}, key="inner")


def test_options_that_name_no_target_are_refused_when_built() -> None:
    nameless = Component("teacher.model", {"width": 2}, None, {"width": 2})
    with pytest.raises(ConfigError, match=r"^teacher\.model: has options and names nothing"):
        nameless.build()
