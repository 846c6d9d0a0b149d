"""From a config to a student: what stands around its quantizers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qtrain.config.compose import compose
from qtrain.convert.layers import quantizers_of
from qtrain.pipeline.conversion import convert
from qtrain.quantizers.uniform.lsq import LSQ
from qtrain.quantizers.wrappers.oscillation import Oscillation
from qtrain.quantizers.wrappers.wrapper import Wrapper
from qtrain.utils.errors import ConfigError

LSQ_PER_CHANNEL = ["granularity@quantize.weight.granularity=channel", "quantize.weight.init=range"]


def converted(*overrides: str) -> nn.Module:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    convert(compose([*LSQ_PER_CHANNEL, *overrides]), model, torch.zeros(1, 1, 8, 8))
    return model


@pytest.mark.parametrize("wrapper", ["oscillation", "quant_noise", "incremental", "blend"])
def test_a_wrapper_stands_around_the_recipes_weight_quantizer(wrapper: str) -> None:
    found = quantizers_of(converted(f"+quantizer@quantize.weight_wrapper={wrapper}"))
    around, plain = found["0.weight_quantizer"], found["0.input_quantizer"]
    assert isinstance(around, Wrapper)
    inner = around.inner
    assert isinstance(inner, LSQ)
    assert inner.init == "range", "the wrapper's own default inside is replaced"
    assert inner.scale.numel() == 4, "one scale for each channel"
    assert isinstance(plain, LSQ)


def test_the_wrappers_options_are_kept() -> None:
    around = quantizers_of(converted("+quantizer@quantize.weight_wrapper=oscillation",
                                     "quantize.weight_wrapper.momentum=0.25"))["0.weight_quantizer"]  # fmt: skip
    assert isinstance(around, Oscillation)
    assert around.momentum == 0.25


def test_what_holds_no_other_quantizer_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"quantize.weight_wrapper: LSQ holds no other quantizer; take"):
        converted("+quantizer@quantize.weight_wrapper=lsq")
