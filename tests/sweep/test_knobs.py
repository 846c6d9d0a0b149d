"""Knobs: what they set, how it is spelled, which layers share a width, and mistakes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from qtrain.sweep.bit_widths import BitWidths, Of, Per, model_blocks, model_stages
from qtrain.sweep.domains import Interval, Options
from qtrain.sweep.first_last_bits import FirstLastBits
from qtrain.sweep.knobs import Bundle, Choice, IntegerRange, LogUniformRange, UniformRange, spelled

RESNET = """
    conv1 layer1.0.conv1 layer1.0.conv2 layer2.0.conv1 layer2.0.conv2 layer2.0.downsample.0 fc
""".split()
TRANSFORMER = "patch_embed.proj blocks.0.attn.qkv blocks.0.mlp.fc1 blocks.1.attn.qkv blocks.1.mlp.fc1 head".split()
MOBILENET = """
    conv_stem blocks.0.0.conv_dw blocks.0.0.conv_pw blocks.1.0.conv_pw blocks.1.0.se.conv_reduce blocks.2.0.conv head
""".split()
TORCHVISION = "features.0.0 features.1.conv.0.0 features.1.conv.1 features.2.conv.0.0 features.2.conv.1.0".split()
CONVNEXT = """
    stages.1.downsample.1 stages.1.blocks.0.conv_dw stages.1.blocks.0.mlp.fc1 stages.1.blocks.1.mlp.fc1
    stages.1.blocks.1.mlp.fc2
""".split()


@pytest.mark.parametrize(
    "value",
    [
        0.001, 1e-05, -3, 7, True, None, "soft", "true", "null", "nan", "3", "two words", "it's", 'say "hi"', "a\\",
        "a\\'b", "", "cifar10/w4a4", "layer1.*", "${seed}", "x=1,2", [2, "a b", [None]],
        {"layer1.0.conv1": [2, 4], "fc": [8, 8]},
        ["fit.epochs=2", "+callback@callbacks.bits=bits", "~lr_schedule", "+a={b:[1,2],c:'d e'}"],
    ],
    ids=repr,
)  # fmt: skip
def test_hydra_reads_what_is_spelled(value: Any) -> None:
    read = OverridesParser.create().parse_override(f"key={spelled(value)}").value()
    assert read == value
    assert type(read) is type(value) or isinstance(value, str)


def test_a_setting_sets_its_key_or_what_it_is_called() -> None:
    assert Choice(options=["soft", "hard"]).effect("objective", {"": "soft"}, []).overrides == ["objective=soft"]
    rate = LogUniformRange(low=1e-4, high=1e-2, key="optimizer.lr")
    assert rate.effect("lr", {"": 0.001}, []).overrides == ["optimizer.lr=0.001"]
    assert rate.domains([]) == {"": Interval(1e-4, 1e-2, log=True)}
    assert UniformRange(low=0, high=1).domains([]) == {"": Interval(0.0, 1.0)}
    assert IntegerRange(low=1, high=8, log=True).domains([]) == {"": Interval(1, 8, log=True, whole=True)}


def test_a_bundle_sets_all_of_its_overrides() -> None:
    knob = Bundle(options={"plain": [], "long": ["fit.epochs=9", "optimizer.lr=0.1"]})
    assert knob.domains([]) == {"": Options(("plain", "long"))}
    assert knob.effect("schedule", {"": "plain"}, []).overrides == []
    assert knob.effect("schedule", {"": "long"}, []).overrides == ["fit.epochs=9", "optimizer.lr=0.1"]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (RESNET, "conv1 layer1.0 layer1.0 layer2.0 layer2.0 layer2.0 fc"),
        (TRANSFORMER, "patch_embed.proj blocks.0 blocks.0 blocks.1 blocks.1 head"),
        # Stages of blocks; one block is a single convolution.
        (MOBILENET, "conv_stem blocks.0.0 blocks.0.0 blocks.1.0 blocks.1.0 blocks.2.0.conv head"),
        # A block's own sequences are no blocks.
        (TORCHVISION, "features.0.0 features.1 features.1 features.2 features.2"),
        # What stands between the blocks of a stage is the stage's.
        (CONVNEXT, "stages.1 stages.1.blocks.0 stages.1.blocks.0 stages.1.blocks.1 stages.1.blocks.1"),
        (["features.0", "features.3", "classifier"], "features.0 features.3 classifier"),
    ],
    ids=["resnet", "transformer", "mobilenet", "torchvision", "convnext", "vgg"],
)
def test_blocks_are_what_repeats(layers: list[str], expected: str) -> None:
    assert model_blocks(layers) == dict(zip(layers, expected.split(), strict=True))


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([*RESNET[:-1], "layer1.1.conv1", "fc"], "conv1 layer1 layer1 layer2 layer2 layer2 layer1 fc"),
        (TRANSFORMER, "patch_embed.proj blocks.0 blocks.0 blocks.1 blocks.1 head"),
        (MOBILENET, "conv_stem blocks.0 blocks.0 blocks.1 blocks.1 blocks.2.0.conv head"),
        (CONVNEXT, "stages.1 stages.1 stages.1 stages.1 stages.1"),
    ],
    ids=["resnet", "transformer", "mobilenet", "convnext"],
)
def test_stages_are_what_holds_blocks(layers: list[str], expected: str) -> None:
    assert list(model_stages(layers).values()) == expected.split()


@pytest.mark.parametrize(
    ("per", "first_last", "groups"),
    [
        ("model", 8, {""}),
        ("stage", 8, {".layer1", ".layer2"}),
        ("block", 8, {".layer1.0", ".layer2.0"}),
        ("block", None, {".conv1", ".layer1.0", ".layer2.0", ".fc"}),
        ("layer", 8, {f".{name}" for name in RESNET[1:-1]}),
    ],
)
def test_widths_have_a_parameter_for_what_shares_them(per: Per, first_last: int | None, groups: set[str]) -> None:
    domains = BitWidths(choices=[4, 2, 3, 3], per=per, first_last=first_last).domains(RESNET)
    assert set(domains) == groups
    assert all(domain == Options((2, 3, 4)) for domain in domains.values()), "rising, each once"


@pytest.mark.parametrize(("of", "pair"), [("both", (3, 3)), ("weight", (3, None)), ("input", (None, 3))])
def test_widths_give_bits_to_each_layer(of: Of, pair: tuple[int | None, int | None]) -> None:
    knob = BitWidths(choices=[2, 3], of=of)
    bits = knob.effect("widths", {".layer1.0": 3, ".layer2.0": 2}, RESNET).bits
    assert list(bits) and set(bits) == set(RESNET)
    assert bits["layer1.0.conv2"] == pair
    assert bits["layer2.0.downsample.0"] == tuple(None if part is None else 2 for part in pair)
    assert bits["conv1"] == bits["fc"] == tuple(None if part is None else 8 for part in pair)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Choice(options=[]), "Choice: options must not be empty"),
        (lambda: Choice(options=["a", "b", "a"]), "Choice: options must differ, got 'a' twice"),
        (lambda: UniformRange(low=1, high=1), "UniformRange: low must be below high, got low=1 and high=1"),
        (lambda: LogUniformRange(low=0, high=1), "LogUniformRange: low must be above 0"),
        (lambda: IntegerRange(low=5, high=2), "IntegerRange: low must be below high"),
        (lambda: Bundle(options={}), "Bundle: options must not be empty"),
        (lambda: Bundle(options={"a": "fit.epochs=2"}), r"Bundle: options\.a must be a list of overrides"),
        (lambda: Choice(options=[1], when={"objective": []}), r"Choice: when\.objective must be a list of values"),
        (lambda: Choice(options=[1], when={"objective": "soft"}), r"when\.objective must be a list .* got 'soft'"),
        (lambda: BitWidths(choices=[]), "BitWidths: choices must not be empty"),
        (lambda: BitWidths(choices=[2, 17]), r"BitWidths: bits must be 1\.\.16, or 32 .* got 17"),
        (lambda: BitWidths(choices=[2], first_last=0), "BitWidths: bits must be"),
        (lambda: FirstLastBits(choices=[]), "FirstLastBits: choices must not be empty"),
        (lambda: FirstLastBits(choices=[8, 0]), "FirstLastBits: bits must be"),
        (
            lambda: BitWidths(choices=[2]).domains(["conv", "fc"]),
            "has 2 quantizable layers, first and last; give first_last=null",
        ),
    ],
)
def test_what_cannot_be_turned_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
