"""Energy, area and OLAccel: against loops over single operations, and against the published numbers."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from qtrain.config.compose import compose
from qtrain.costs.geometry import LayerGeometry, layer_geometries
from qtrain.costs.metrics.area import Area
from qtrain.costs.metrics.base import CostMetric
from qtrain.costs.metrics.energy import Energy
from qtrain.costs.metrics.olaccel import OLAccel
from qtrain.costs.tables import codes_alone, cost_table
from qtrain.costs.technology import Technology, at_width
from qtrain.settings.component import Component, built
from qtrain.spec import LayerBits
from qtrain.utils.errors import ConfigError


def chosen(name: str, *overrides: str) -> CostMetric:
    """The metric of conf/cost/NAME.yaml."""
    components = compose([f"+cost@allocate.costs.some={name}", *overrides]).allocate.costs
    component = components["some"]
    assert isinstance(component, Component)
    metric = built(component)
    assert isinstance(metric, CostMetric)
    return metric


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, padding=1, stride=2, bias=False)
        self.fc = nn.Linear(3, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).mean((2, 3)))


GEOMETRIES = layer_geometries(Tiny(), torch.zeros(1, 2, 6, 6))
ALLOCATION = {"conv": LayerBits(4, 8), "fc": LayerBits(8, 4)}


def total(metric: CostMetric, allocation: dict[str, LayerBits] = ALLOCATION, fixed_bytes: int = 0) -> float:
    options = {name: [bits] for name, bits in allocation.items()}
    return cost_table(metric, GEOMETRIES, options, codes_alone(GEOMETRIES), fixed_bytes).total(allocation)


def one_by_one(operation: Callable[[LayerBits], float], weight_bit: float, input_bit: float) -> float:
    """Every product of :class:`Tiny`, every stored weight and every element of an input, in loops."""
    found = 0.0
    for _ in range(3 * 3 * 3):  # outputs of the convolution: 3 channels, 3 x 3
        for _ in range(2 * 3 * 3):
            found += operation(ALLOCATION["conv"])
    for _ in range(2 * 3):
        found += operation(ALLOCATION["fc"])
    for layer, weights, inputs in (("conv", 54, 72), ("fc", 6, 3)):
        for _ in range(weights):
            found += ALLOCATION[layer].weight * weight_bit
        for _ in range(inputs):
            found += ALLOCATION[layer].input * input_bit
    return found


def test_energy_equals_a_loop_over_operations_and_bits() -> None:
    # 45 nm: a product of 4 by 8 bits is near half of one of 8 by 8; a 32-bit addition; DRAM, and two accesses of SRAM.
    multiply = 0.2 * 0.5 ** (math.log(3.1 / 0.2) / math.log(16))
    expected = one_by_one(lambda bits: multiply + 0.1, 1300 / 64, 2 * 100 / 64)
    assert total(chosen("energy")) == pytest.approx(1e-6 * expected)


def test_energy_of_what_no_layer_owns_is_one_access_outside_the_chip() -> None:
    metric = chosen("energy")
    assert total(metric, fixed_bytes=8) - total(metric) == pytest.approx(1e-6 * 1300)


def test_published_operations_cost_what_is_published() -> None:
    metric = chosen("energy")
    assert isinstance(metric, Energy)
    technology = metric.technology
    assert technology.product(8, 8, 8) == pytest.approx(0.2 + 0.03)
    assert technology.product(8, 8, 32) == pytest.approx(0.2 + 0.1)
    assert technology.product(32, 32, 32) == technology.product(4, 32, 32) == pytest.approx(3.7 + 0.9)
    assert at_width(technology.integer_multiply, 32) == pytest.approx(3.1)
    assert 0.9 / at_width(technology.integer_add, 8) == pytest.approx(30), (
        "an addition in floating point, of one in INT8"
    )


def test_multipliers_scale_nearly_with_the_product_of_their_widths() -> None:
    points = chosen("energy").technology.integer_multiply  # type: ignore[attr-defined]
    for width in (1, 2, 4, 8, 16):
        assert at_width(points, width) == pytest.approx(0.2 * width**2 / 64, rel=0.06)


def test_a_large_input_goes_outside_the_chip() -> None:
    technology = chosen("energy").technology  # type: ignore[attr-defined]
    size = 8 * technology.sram_bytes
    assert technology.buffered(size) == pytest.approx(2 * 100 * size / 64)
    assert technology.buffered(size + 64) == pytest.approx(2 * 1300 * (size + 64) / 64)


def test_another_technology_is_another_file() -> None:
    metric = chosen("energy", "technology@allocate.costs.some.technology=7nm")
    assert isinstance(metric, Energy)
    assert metric.technology.product(8, 8, 32) == pytest.approx(0.07 + 0.03)


def test_area_equals_a_loop_over_units_and_bits() -> None:
    metric = chosen("area", "allocate.costs.some.clock_hz=100", "allocate.costs.some.images_per_second=1")
    multiplier = 282 * 0.5 ** (math.log(3495 / 282) / math.log(16))
    # 486 products at 100 a second take five units; the 6 of the head take one.
    units = sum(multiplier + 137 for _ in range(5 + 1))
    assert total(metric) == pytest.approx(1e-6 * (units + (54 * 4 + 6 * 8) * 0.346))
    float_add, integer_add = 4184.0, at_width([(8, 36.0), (16, 67.0), (32, 137.0)], 8)
    assert float_add / integer_add == pytest.approx(116, abs=0.5), "the survey's ratio of areas"


def test_olaccel_without_outliers_is_a_machine_of_4_bit_units() -> None:
    none = [
        "allocate.costs.some.weight_outliers=0",
        "allocate.costs.some.input_outliers=0",
        "allocate.costs.some.group_bits=0",
    ]
    metric = chosen("olaccel", *none)
    assert isinstance(metric, OLAccel)
    small = metric.technology.product(4, 4, 24)
    # Each of the two layers has one factor of 8 bits: two passes.
    expected = one_by_one(lambda bits: 2 * small, 1300 / 64, 2 * 100 / 64)
    assert total(metric) == pytest.approx(1e-6 * expected)


def test_olaccel_counts_outliers_by_their_share() -> None:
    metric = chosen("olaccel")
    assert isinstance(metric, OLAccel)
    one = LayerGeometry("one", "linear", weight_shape=(10, 100), weights=1000, macs=1000, inputs=100, outputs=10)
    product = metric.technology.product
    small, wide = product(4, 4, 24), product(4, 16, 24)
    made = 1000 * (0.97 * (1 + 0.03) * small + 0.03 * wide)
    weights, inputs = 1000 * 4 + 1000 / 16 * 16, 100 * (4 + 0.03 * 32)
    moved = weights * 1300 / 64 + inputs * 2 * 100 / 64
    assert metric.layer(one, LayerBits(4, 4), 4000, 32) == pytest.approx(1e-6 * (made + moved))


def test_olaccel_has_no_outliers_in_wider_weights() -> None:
    """Weights of 8 bits take two passes, and no group of them stores bits for an outlier."""
    metric = chosen("olaccel")
    assert isinstance(metric, OLAccel)
    one = LayerGeometry("one", "linear", weight_shape=(10, 100), weights=1000, macs=1000, inputs=100, outputs=10)
    product = metric.technology.product
    made = 1000 * (0.97 * 2 * product(4, 4, 24) + 0.03 * product(8, 16, 24))
    moved = 1000 * 8 * 1300 / 64 + 100 * (4 + 0.03 * 32) * 2 * 100 / 64
    assert metric.layer(one, LayerBits(8, 4), 8000, 32) == pytest.approx(1e-6 * (made + moved))


def test_olaccel_narrows_floating_point_to_its_widest_units() -> None:
    metric = chosen("olaccel")
    one = LayerGeometry("one", "linear", weight_shape=(10, 100), weights=1000, macs=1000, inputs=100, outputs=10)
    widest = metric.layer(one, LayerBits(8, 16), 8000, 0)
    assert metric.layer(one, LayerBits(32, 32), 32000, 0) == pytest.approx(widest)
    assert metric.layer(one, LayerBits(32, 16), 3000, 0) < widest, "a codebook stays as small as it is"


@pytest.mark.parametrize("name", ["energy", "olaccel", "area"])
def test_fewer_bits_never_cost_more(name: str) -> None:
    metric, widths = chosen(name), (1, 2, 3, 4, 8, 32)
    for geometry in GEOMETRIES:
        for side in range(2):
            costs = [
                metric.layer(geometry, bits, bits.weight * geometry.weights, 0)
                for bits in (LayerBits(*((b, 8) if side == 0 else (8, b))) for b in widths)
            ]
            assert costs == sorted(costs)


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("energy", "allocate.costs.some.technology.integer_add=[[8,0.03]]", "integer_add: needs two or more pairs"),
        ("energy", "allocate.costs.some.technology.integer_add=[[32,0.1],[8,0.03]]", "bits rising"),
        ("energy", "allocate.costs.some.technology.access_bits=0", "access_bits: must be at least 1"),
        ("olaccel", "allocate.costs.some.weight_outliers=3", "weight_outliers must be in \\[0, 1\\], got 3"),
        ("olaccel", "allocate.costs.some.group=0", "group must be at least 1, got 0"),
        ("olaccel", "allocate.costs.some.unit_bits=0", "unit_bits must be at least 1, got 0"),
        ("area", "allocate.costs.some.clock_hz=0", "clock_hz must be above 0, got 0"),
        ("area", "allocate.costs.some.images_per_second=-1", "images_per_second must be above 0, got -1"),
    ],
)
def test_a_table_that_is_none_is_refused_in_one_line(name: str, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        chosen(name, override)


def test_technology_needs_no_config() -> None:
    made = Technology(
        integer_add=[(8, 1.0), (32, 4.0)], integer_multiply=[(8, 64.0), (32, 1024.0)],
        float_add=1.0, float_multiply=1.0, sram_bytes=1, sram_access=1.0, dram_access=1.0, access_bits=1,
    )  # fmt: skip
    assert made.product(4, 2, 16) == pytest.approx(8 + 2), "exactly in proportion"
    assert isinstance(chosen("area"), Area)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["float_add", "float_multiply", "sram_bytes", "sram_access", "dram_access"])
def test_a_technology_has_no_cost_that_is_negative_or_not_finite(name: str, value: float) -> None:
    table = [(8, 1.0), (32, 4.0)]
    costs = dict.fromkeys(("float_add", "float_multiply", "sram_bytes", "sram_access", "dram_access"), 1.0)
    Technology(integer_add=table, integer_multiply=table, access_bits=64, **(costs | {name: 0.0}))
    with pytest.raises(ValueError, match=f"{name}: must be a finite number of at least 0, got {value}"):
        Technology(integer_add=table, integer_multiply=table, access_bits=64, **(costs | {name: value}))
    for option in ("integer_add", "integer_multiply"):
        tables = {"integer_add": table, "integer_multiply": table} | {option: [(8, 1.0), (32, value)]}
        with pytest.raises(ValueError, match=f"{option}: needs two or more pairs"):
            Technology(**tables, access_bits=64, **costs)
