"""From a config node to an object: nesting, partials, live arguments, and whose fault an error is."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from qtrain.config.instantiate import instantiate
from qtrain.quantizers.uniform.lsq import LSQ
from qtrain.spec import PerChannel, QuantSpec
from qtrain.utils.errors import ConfigError

QUANTIZER = {
    "_target_": "qtrain.quantizers.uniform.lsq.LSQ",
    "_partial_": True,
    "granularity": {"_target_": "qtrain.spec.granularity.PerChannel", "axis": 0},
}


def test_nothing_becomes_nothing() -> None:
    assert instantiate(None) is None


def test_a_partial_is_completed_later_and_what_it_holds_is_built() -> None:
    made = instantiate(OmegaConf.create(QUANTIZER))
    assert isinstance(made, partial)
    quantizer = made(spec=QuantSpec(bits=4, shape=(8, 3, 3, 3)))
    assert isinstance(quantizer, LSQ)
    assert quantizer.granularity == PerChannel(axis=0)
    assert quantizer.scale.shape == (8, 1, 1, 1)


def test_live_arguments_arrive_as_the_same_objects() -> None:
    weight = nn.Parameter(torch.zeros(3))
    optimizer = instantiate(OmegaConf.create({"_target_": "torch.optim.SGD", "lr": 0.5}), params=[weight], lr=0.25)
    assert optimizer.param_groups[0]["params"][0] is weight
    assert optimizer.param_groups[0]["lr"] == 0.25


def test_containers_without_a_target_are_built_element_by_element() -> None:
    node = OmegaConf.create(
        {"axis": [{"_target_": "qtrain.spec.granularity.PerChannel", "axis": 1}, 5], "note": "plain"}
    )
    made = instantiate(node)
    assert made == {"axis": [PerChannel(axis=1), 5], "note": "plain"}
    assert type(made) is dict
    assert type(made["axis"]) is list


def test_interpolations_reach_outside_the_node() -> None:
    cfg = OmegaConf.create(
        {"axis": 3, "granularity": {"_target_": "qtrain.spec.granularity.PerChannel", "axis": "${axis}"}}
    )
    assert instantiate(cfg.granularity) == PerChannel(axis=3)


def test_a_constructors_own_rule_is_reported_with_the_key() -> None:
    cfg = OmegaConf.create({"deep": {"spec": {"_target_": "qtrain.spec.QuantSpec", "bits": 99}}})
    with pytest.raises(ConfigError, match=r"^deep\.spec: QuantSpec: bits must be in 1\.\.16, got 99"):
        instantiate(cfg.deep)


def test_targets_are_checked_again() -> None:
    with pytest.raises(ConfigError, match=r"^inner\._target_: 'os\.system' is not admitted"):
        instantiate(OmegaConf.create({"inner": {"_target_": "os.system", "command": "true"}}))
