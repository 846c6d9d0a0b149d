"""What the script tries: every quantizer, and options that compose at bits that it has."""

from types import ModuleType

import pytest

from qtrain.settings.conf_dir import conf_dir
from tests.helpers.script import load_script


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("calibrate_quantizers")


def test_every_quantizer_is_tried_for_weights_and_inputs(script: ModuleType) -> None:
    plain = {(place, name) for place, name, options in script.cases() if not options}
    assert plain == {(place, path.stem) for path in (conf_dir() / "quantizer").glob("*.yaml") for place in PLACES}


PLACES = ("weight", "input")


@pytest.mark.parametrize(
    ("name", "options", "weight", "first"),
    [("apot", "normalize=true", 4, 8), ("twn", "exact=true", 2, 32), ("binary_connect", "bound=glorot", 1, 32)],
)
def test_options_compose_at_bits_that_the_quantizer_has(
    name: str, options: str, weight: int, first: int, script: ModuleType
) -> None:
    assert ("weight", name, options) in set(script.cases())
    settings = script.settings_of("weight", name, options, ["+experiment=cifar10/calibrated", "variants=null"])
    key, _, value = options.partition("=")
    assert str(settings.quantize.weight.options[key]).lower() == value
    bits = settings.quantize.bits.build()(["a", "b", "c"])
    assert [bits[layer].weight for layer in "abc"] == [first, weight, first]


def test_places_that_a_quantizer_does_not_serve_are_left_out(script: ModuleType) -> None:
    assert script.settings_of("input", "twn", "", ["+experiment=cifar10/calibrated", "variants=null"]) is None


def test_an_option_may_be_an_override_of_another_key(script: ModuleType) -> None:
    options = "quantize.bits.weight=8 rounding@quantize.rounding=product_output"
    assert ("weight", "product", options) in set(script.cases())
    settings = script.settings_of("weight", "product", options, ["+experiment=cifar10/calibrated", "variants=null"])
    assert settings.quantize.rounding.kind == "ProductOutput"
    assert settings.quantize.bits.build()(["a", "b", "c"])["b"].weight == 8


@pytest.mark.parametrize(("element", "bits"), [("e3m2", 6), ("e5m2", 8), ("int8", 8)])
def test_elements_of_ocp_mx_are_tried_at_their_own_bits(element: str, bits: int, script: ModuleType) -> None:
    common = ["+experiment=cifar10/calibrated", "variants=null"]
    settings = script.settings_of("weight", "ocp_mx", f"element={element}", common)
    assert settings.quantize.bits.build()(["a", "b", "c"])["b"].weight == bits
