"""From `sweep.space` to knobs: what may stand there, layers of the model, and a rehearsal that finds typos."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest

from qtrain.config.compose import compose
from qtrain.data.base import VisionData
from qtrain.pipeline.load_data import load_data
from qtrain.settings.run_settings import RunSettings
from qtrain.sweep.domains import Interval, Options
from qtrain.sweep.knobs import Choice
from qtrain.sweep.make_space import make_space, rehearse_space
from qtrain.sweep.space import MANUAL, Space
from qtrain.utils.errors import ConfigError
from tests.helpers.changed import changed

BASE = ("task=sweep", "data.max_train=64", "model=cifar_resnet8", "model.width=0.25")
KNOBS = (
    "+knob@sweep.space.widths=bit_widths",
    "sweep.space.widths.of=weight",
    "+knob@sweep.space.lr=log_uniform",
    "sweep.space.lr.low=1e-4",
    "sweep.space.lr.high=0.01",
    "sweep.space.lr.key=optimizer.lr",
    "sweep.space.lr.when={objective:[soft]}",
    "+sweep.space.objective=[soft,hard]",
    "+sweep.space.course={at_once:[],falling:['+callback@callbacks.bits=bits']}",
)

RANGE = {"_target_": "qtrain.sweep.knobs.UniformRange"}


@cache
def composed(*overrides: str) -> RunSettings:
    return compose([*BASE, *overrides])


@pytest.fixture(scope="module")
def data() -> VisionData:
    return load_data(composed())


def with_space(data: VisionData, space: Any) -> Space:
    return make_space(changed(composed(), {"sweep.space": space}), data)


def test_from_the_command_line(data: VisionData) -> None:
    space = make_space(composed(*KNOBS), data)
    widths = Options((2, 3, 4))
    assert space.parameters == {
        "widths.layer1.0": widths,
        "widths.layer2.0": widths,
        "widths.layer3.0": widths,
        "objective": Options(("soft", "hard")),
        "course": Options(("at_once", "falling")),
        "lr": Interval(1e-4, 0.01, log=True),
    }
    point = {"widths.layer1.0": 2, "widths.layer2.0": 3, "widths.layer3.0": 4, "objective": "hard", "course": "falling"}
    *settings, group, bits = space.overrides(point)
    assert settings == ["objective=hard", "+callback@callbacks.bits=bits"]
    assert group == MANUAL
    # Inputs keep the config's own bits: four, and eight at the ends, where the knob gives eight to weights.
    assert bits.startswith(
        "++quantize.bits.layers={conv1:[8,8],layer1.0.conv1:[2,4],layer1.0.conv2:[2,4],layer2.0.conv1"
    )
    trial = compose([*BASE, *KNOBS, *space.overrides(point)])
    assert trial.quantize.bits.options["layers"]["layer3.0.conv2"] == [4, 4]


def test_null_takes_a_knob_away(data: VisionData) -> None:
    space = with_space(data, {"objective": ["soft", "hard"], "seed": None})
    assert list(space.parameters) == ["objective"]


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"lr": {**RANGE, "low": 2, "high": 1}}, r"sweep\.space\.lr: UniformRange: low must be below high"),
        ({"lr": {**RANGE, "low": 2}}, r"sweep\.space\.lr: UniformRange needs high"),
        (None, r"sweep\.space: the space is empty"),
        ({"lr": 0.1}, r"sweep\.space\.lr: must be a list of values, a mapping of labels to overrides, or a knob"),
        ({"lr": []}, r"sweep\.space\.lr: Choice: options must not be empty"),
        ({"course": {"plain": "fit.epochs=2"}}, r"sweep\.space\.course: Bundle: options\.plain must be a list"),
        (
            {"lr": {"_target_": "qtrain.schedules.constant.Constant", "value": 1}},
            r"sweep\.space\.lr: must be a list of values",
        ),
        (
            {"seed": {"_target_": "qtrain.sweep.knobs.Choice", "options": [1], "when": {"x": [1]}}},
            r"sweep\.space: seed\.when: there is no knob 'x' in the space",
        ),
    ],
)
def test_what_is_no_space_is_said_in_one_line(data: VisionData, space: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        with_space(data, space)
    assert "\n" not in str(raised.value)


def test_bits_of_a_model_in_full_precision_are_refused(data: VisionData) -> None:
    cfg = composed("+knob@sweep.space.widths=bit_widths", "quantize.enabled=false")
    with pytest.raises(ConfigError, match=r"sweep\.space: has knobs for bits, and quantize\.enabled is false"):
        make_space(cfg, data)


def test_a_rehearsal_sees_every_value() -> None:
    seen: list[list[str]] = []

    def composing(changes: Sequence[str]) -> RunSettings:
        seen.append(list(changes))
        return composed()

    rehearse_space(
        composed(), Space({"a": Choice(options=[1, 2, 3]), "b": Choice(options=["x"], when={"a": [3]})}), composing
    )
    assert sorted(seen) == [["a=1"], ["a=2"], ["a=3", "b=x"]]


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("optimizer.lrr", r"unknown key 'optimizer\.lrr'"),
        ("objective", r"objective=soft_hnt: there is no such objective; did you mean 'soft_hint'\?"),
        ("fit.final_test", r"sweep\.space: 'fit\.final_test=soft_hint' sets fit\.final_test, which all trials have"),
        ("sweep.trials", r"sweep\.space: 'sweep\.trials=soft_hint' sets sweep, which all trials have from the sweep"),
        ("search@sweep.search", r"sets sweep, which all trials have from the sweep"),
    ],
)
def test_a_rehearsal_finds_what_would_fail_each_trial(key: str, message: str) -> None:
    space = Space({"knob": Choice(options=["soft_hint", "soft_hnt"], key=key)})
    with pytest.raises(ConfigError, match=message):
        rehearse_space(composed(), space, lambda changes: compose([*BASE, *changes]))


def test_bits_by_name_and_another_model_do_not_go_together(data: VisionData) -> None:
    cfg = composed("+knob@sweep.space.widths=bit_widths", "+sweep.space.model=[cifar_resnet8,cifar_resnet20]")
    own = [override for override in BASE if not override.startswith("model=")]
    with pytest.raises(ConfigError, match=r"sweep\.space: changes the model"):
        rehearse_space(cfg, make_space(cfg, data), lambda changes: compose([*own, *changes]))


@pytest.mark.parametrize(
    ("space", "said"),
    [
        (["+knob@sweep.space.widths=bit_widths", "sweep.space.widths.choices=[4,8,16]"], "weights 16 bits"),
        (["+sweep.space.wide={key: quantize.bits.input, options: [8, 12], _target_: qtrain.sweep.knobs.Choice}"],
         "inputs 12 bits"),
    ],
)  # fmt: skip
def test_bits_that_the_target_does_not_compute_with_are_refused(data: VisionData, space: list[str], said: str) -> None:
    cfg = composed(*space, "target=onnxruntime")
    with pytest.raises(ConfigError, match=f"sweep.space: gives {said}, and onnxruntime computes with 8 at most"):
        rehearse_space(cfg, make_space(cfg, data), lambda changes: compose([*BASE, "target=onnxruntime", *changes]))
    free = composed(*space)
    rehearse_space(free, make_space(free, data), lambda changes: compose([*BASE, *changes]))


def test_full_precision_and_few_bits_are_for_any_target(data: VisionData) -> None:
    cfg = composed("+knob@sweep.space.widths=bit_widths", "sweep.space.widths.choices=[2,8,32]", "target=openvino")
    rehearse_space(cfg, make_space(cfg, data), lambda changes: compose([*BASE, "target=openvino", *changes]))
