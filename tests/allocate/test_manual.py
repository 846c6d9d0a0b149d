"""Bits by hand: names before patterns, later patterns before earlier ones, the rest as uniform, and mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest

from qtrain.allocate.manual import Manual
from qtrain.allocate.uniform import Uniform
from qtrain.config.compose import compose
from qtrain.spec import LayerBits
from qtrain.utils.errors import ConfigError

LAYERS = ["conv1", "layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1", "layer2.0.conv2", "fc"]


def test_without_layers_it_is_uniform() -> None:
    first, last = LayerBits(8, 8), LayerBits(8, 32)
    manual = Manual(weight=3, input=4, first=first, last=last)
    assert manual(LAYERS) == Uniform(weight=3, input=4, first=first, last=last)(LAYERS)


def test_a_name_comes_before_a_pattern_and_a_later_pattern_before_an_earlier() -> None:
    manual = Manual(
        layers={"layer2.0.conv1": (2, 2), "layer*": (3, 4), "*.conv2": (5, 6), "fc": (32, 32)},
        weight=4,
        input=4,
        first=LayerBits(8, 8),
        last=LayerBits(8, 8),
    )
    assert manual(LAYERS) == {
        "conv1": LayerBits(8, 8),
        "layer1.0.conv1": LayerBits(3, 4),
        "layer1.0.conv2": LayerBits(5, 6),
        "layer2.0.conv1": LayerBits(2, 2),
        "layer2.0.conv2": LayerBits(5, 6),
        "fc": LayerBits(32, 32),
    }
    assert list(manual(LAYERS)) == LAYERS, "in the order in which they run"


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"layer1.0.conv": (2, 2)}, r"Manual: layers\.layer1\.0\.conv fits no quantizable layer; did you mean 'layer1"),
        ({"blocks.*": (2, 2)}, r"Manual: layers\.blocks\.\* fits no quantizable layer; there are conv1, layer1"),
    ],
)
def test_patterns_that_match_no_layer_are_refused(layers: dict[str, tuple[int, int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Manual(layers=layers, weight=4, input=4)(LAYERS)


def test_bits_that_no_quantizer_has_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Manual: layers\.conv1\.input must be 1\.\.16 bits, or 32 .* got 17"):
        Manual(layers={"conv1": (4, 17)}, weight=4, input=4)
    with pytest.raises(ValueError, match=r"first\.weight must be"):
        Manual(weight=4, input=4, first=LayerBits(0, 8))


def test_command_line_sets_layer_bits_over_uniform_experiment() -> None:
    manual = ["allocate@quantize.bits=manual", "quantize.bits.layers={layer1.*:[2,4],fc:[32,32]}"]
    cfg = compose(["+experiment=quickstart", "quantize.bits.weight=3", *manual])
    bits = cfg.quantize.bits.build()(LAYERS)
    assert bits["layer1.0.conv2"] == LayerBits(2, 4)
    assert bits["layer2.0.conv1"] == LayerBits(3, 4)
    assert bits["conv1"] == LayerBits(8, 8)
    assert bits["fc"] == LayerBits(32, 32)
    assert Path(cfg.run_dir).name == "manual-distill", "no width stands for all of its layers"


@pytest.mark.parametrize("pair", ["[2]", "[2,3,4]", "2", "[two,2]"])
def test_value_that_is_no_pair_gives_a_one_line_error(pair: str) -> None:
    with pytest.raises(ConfigError, match=r"quantize\.bits\.layers: Manual takes Mapping\[str, tuple\[int, int\]\]"):
        compose(["allocate@quantize.bits=manual", f"quantize.bits.layers={{fc:{pair}}}"])
