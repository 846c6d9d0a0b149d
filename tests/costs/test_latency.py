"""Times of layers: read from a table, wider kernels for few bits, rooflines where nothing was measured."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from qtrain.costs.geometry import layer_geometries
from qtrain.costs.latency_table import LatencyTable, LayerShape, Time, narrowest, read_table, write_table
from qtrain.costs.metrics.latency import Latency, roofline
from qtrain.costs.tables import codes_alone, cost_table
from qtrain.spec import LayerBits

W8, W32 = LayerBits(8, 8), LayerBits(32, 32)

NET = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 64, 5))
GEOMETRIES = layer_geometries(NET, torch.zeros(1, 3, 8, 8))
FIRST, SECOND, HEAD = GEOMETRIES


@pytest.fixture
def file(tmp_path: Path) -> str:
    """Times of the first two layers; the head was not measured."""
    table = LatencyTable(
        network="net",
        machine={"hardware": "some", "threads": 1},
        layers={
            LayerShape.of(FIRST): {W8: Time(10.0, 9.0, 11.0), W32: Time(30.0, 29.0, 31.0)},
            LayerShape.of(SECOND): {W8: Time(20.0, 19.0, 21.0), W32: Time(50.0, 49.0, 51.0)},
        },
        rest={W32: 7.0, W8: 5.0},
        peaks={W8: 1e9, W32: 2e8},
        bytes_per_second=1e12,
        names={LayerShape.of(FIRST): ["0"], LayerShape.of(SECOND): ["1"]},
    )
    path = tmp_path / "latency.json"
    write_table(path, table)
    assert read_table(path) == table, "the file holds all of it"
    return str(path)


def test_an_allocation_takes_the_sum_of_its_layers_and_the_rest(file: str) -> None:
    options = {"0": [W8, W32], "1": [W8, W32], "3": [W32]}
    table = cost_table(Latency(table=file), GEOMETRIES, options, codes_alone(GEOMETRIES), 0)
    head = 1e6 * 5 * 4 * 64 / 2e8
    assert (table.unit, table.fixed) == ("us", 5.0)
    assert table.total({"0": W8, "1": W32, "3": W32}) == pytest.approx(5 + 10 + 50 + head)
    assert table.estimated == {"3"}, "its shape is not in the file"


def test_few_bits_take_as_long_as_the_next_wider_kernel(file: str) -> None:
    metric = Latency(table=file)
    for bits in (LayerBits(4, 4), LayerBits(2, 8)):
        assert metric.layer(FIRST, bits, 0, 0) == 10.0
        assert metric.measured(FIRST, bits)
    half = LayerBits(4, 32)
    assert metric.layer(FIRST, half, 0, 0) == 30.0, "it multiplies in floating point"
    assert not metric.measured(FIRST, half), "and what decodes the weight is not in the file"


def test_a_layer_that_is_called_twice_takes_twice_as_long(file: str) -> None:
    twice = nn.Sequential(NET[0], NET[1], NET[1])
    once, again = (layer_geometries(net, torch.zeros(1, 3, 8, 8))[1] for net in (NET[:2], twice))
    metric = Latency(table=file)
    assert metric.layer(again, W8, 0, 0) == 2 * metric.layer(once, W8, 0, 0) == 40.0


def test_a_kernel_that_the_machine_lacks_is_a_roofline_and_estimated(file: str) -> None:
    metric = Latency(table=file, macs_per_second=[(4, 4e9)])
    bits = LayerBits(4, 3)
    assert metric.layer(FIRST, bits, 0, 0) == pytest.approx(1e6 * FIRST.macs / 4e9)
    assert not metric.measured(FIRST, bits)
    assert metric.layer(FIRST, LayerBits(4, 8), 0, 0) == 10.0 and metric.measured(FIRST, LayerBits(4, 8))
    slow = Latency(table=file, macs_per_second=[(4, 4e9)], bytes_per_second=1e6)
    moved = (FIRST.weights * 4 + (FIRST.inputs + FIRST.outputs) * 3) / 8
    assert slow.layer(FIRST, bits, 0, 0) == pytest.approx(moved), "one byte a microsecond"


def test_a_roofline_is_the_slower_of_computing_and_moving() -> None:
    assert roofline(2e6, 1e3, 1e9, 1e9) == pytest.approx(2000)
    assert roofline(2e3, 1e6, 1e9, 1e9) == pytest.approx(1000)


def test_a_layer_that_is_never_called_takes_no_time(file: str) -> None:
    net = nn.Sequential(nn.Linear(4, 4))
    net.idle = nn.Linear(2, 2)  # type: ignore[assignment]
    net.forward = lambda x: net[0](x)  # type: ignore[method-assign,assignment]
    idle = layer_geometries(net, torch.zeros(1, 4))[1]
    metric = Latency(table=file)
    assert metric.layer(idle, W8, 0, 0) == 0.0 and metric.measured(idle, W8)


def test_a_wrong_file_or_speed_is_refused_in_one_line(file: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no file .*; task=profile writes it"):
        Latency(table=str(tmp_path / "nothing.json"))
    other = tmp_path / "other.json"
    other.write_text('{"format": 1}')
    with pytest.raises(ValueError, match="is no table of latencies"):
        Latency(table=str(other))
    other.write_text('{"format": 9}')
    with pytest.raises(ValueError, match="has version 9, this qtrain reads 1"):
        Latency(table=str(other))
    with pytest.raises(ValueError, match="bytes_per_second must be above 0, got 0"):
        Latency(table=file, bytes_per_second=0.0)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"bytes_per_second": 1000000000000.0', '"bytes_per_second": 0', "bytes_per_second: must be above 0, got 0"),
        (
            '"bytes_per_second": 1000000000000.0',
            '"bytes_per_second": "x"',
            "bytes_per_second: must be a finite number, got 'x'",
        ),
        ('"peak": 1000000000.0', '"peak": 0', "peak: must be above 0, got 0"),
        ('"us": 10.0', '"us": "abc"', "us: must be a finite number, got 'abc'"),
        ('"us": 10.0', '"us": NaN', "us: must be a finite number, got nan"),
        ('"us": 5.0', '"us": -1', "us: must be at least 0, got -1"),
        ('"weight": 8', '"weight": "q"', "invalid literal"),
        ('"network": "net"', '"netwerk": "net"', "no 'network'"),
        ('{\n "format"', '[\n "format"', "Expecting"),
    ],
)
def test_a_table_that_somebody_has_damaged_is_refused_in_one_line(file: str, old: str, new: str, message: str) -> None:
    text = Path(file).read_text()
    assert old in text
    Path(file).write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=rf"is no table of latencies \({message}.*\); task=profile writes") as refused:
        Latency(table=file)
    assert "\n" not in str(refused.value)


def test_a_table_without_peaks_is_refused(file: str) -> None:
    """A shape that is not in it would have no time."""
    content = json.loads(Path(file).read_text())
    Path(file).write_text(json.dumps({**content, "macs_per_second": []}))
    with pytest.raises(ValueError, match=r"is no table of latencies \(macs_per_second is empty\)"):
        Latency(table=file)


def test_the_narrowest_kernel_has_the_least_product_of_both_widths() -> None:
    """For 4 and 4 bits: 8 x 8 is less than 4 x 32, and 16 x 2 has no room for the input."""
    kernels = {LayerBits(16, 2): "narrow", LayerBits(4, 32): "lopsided", W8: "square", W32: "float"}
    assert narrowest(kernels, LayerBits(4, 4)) == "square"
    assert narrowest(kernels, LayerBits(4, 16)) == "lopsided"
    assert narrowest({LayerBits(2, 2): "small"}, LayerBits(4, 2)) is None


@pytest.mark.parametrize("kernels", [[(8, 1e11), (4, 4e11)], [(4, 4e11), (4, 1e11)], [(4,)], [4], [(4, 0.0)]])
def test_kernels_that_are_no_pairs_by_rising_bits_are_refused(file: str, kernels: list[tuple[int, float]]) -> None:
    """With falling bits the first, wide kernel would have taken all layers."""
    with pytest.raises(ValueError, match=r"Latency: macs_per_second must be pairs .*, bits rising, all above 0"):
        Latency(table=file, macs_per_second=kernels)
