"""Tables of costs: a sum over layers, equal to the count of a model that really has these bits."""

import copy

import pytest
import torch
from torch import Tensor, nn

from qtrain.costs.count import count
from qtrain.costs.geometry import layer_geometries
from qtrain.costs.metrics.bit_operations import BitOperations
from qtrain.costs.metrics.size import EffectiveBits, SizeBytes
from qtrain.costs.tables import bytes_outside, codes_alone, cost_table
from qtrain.models.cifar_resnet import cifar_resnet20
from qtrain.nn import QuantConv, QuantLinear
from qtrain.quantizers.uniform.lsq import LSQ
from qtrain.spec import FULL_PRECISION, LayerBits, PerChannel, QuantSpec

IMAGE = torch.zeros(1, 3, 32, 32)


class Net(nn.Module):
    """Two convolutions, the second with 5 x 1 x 3 x 3 weights, whose codes are no whole bytes; a head, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 5, 3, padding=1)
        self.norm = nn.BatchNorm2d(5)
        self.second = nn.Conv2d(5, 5, 3, padding=1, groups=5, bias=False)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.norm(self.first(x)).relu()).mean((2, 3)))


def converted(model: nn.Module, allocation: dict[str, LayerBits]) -> nn.Module:
    """A copy of ``model`` with learned steps for each output channel and each input, of the bits of ``allocation``."""
    model = copy.deepcopy(model)
    for name, bits in allocation.items():
        source = model.get_submodule(name)
        layer = QuantConv(source=source) if isinstance(source, nn.Conv2d) else QuantLinear(source=source)
        if bits.weight < FULL_PRECISION:
            spec = QuantSpec(bits=bits.weight, shape=tuple(layer.weight.shape), signed=True)
            layer.weight_quantizer = LSQ(spec=spec, granularity=PerChannel(0))
        if bits.input < FULL_PRECISION:
            layer.input_quantizer = LSQ(spec=QuantSpec(bits=bits.input))
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    return model


def storage_of(model: nn.Module):  # type: ignore[no-untyped-def]
    """What quantizers of each width say that they store."""

    def storage(layer: str, role: str, bits: int) -> int:
        weight = model.get_submodule(layer).weight
        if bits == FULL_PRECISION:
            return 32 * weight.numel() if role == "weight" else 0
        alone = nn.ModuleDict({"layer": model.get_submodule(layer)})
        one = converted(alone, {"layer": LayerBits(bits, bits)}).get_submodule("layer")
        if role == "weight":
            return int(one.weight_quantizer.quantize(one.effective_weight()).nbits)
        return int(one.input_quantizer.storage_bits())

    return storage


OPTIONS = [LayerBits(w, a) for w in (2, 3, 5, 32) for a in (3, 8, 32)]


@pytest.mark.parametrize("build", [Net, cifar_resnet20])
def test_tables_equal_the_count_of_a_model_that_has_the_bits(build) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    model = build()
    geometries = layer_geometries(model, IMAGE)
    names = [one.name for one in geometries]
    storage, outside = storage_of(model), bytes_outside(model, names)
    metrics = {"size_bytes": SizeBytes(), "effective_bits": EffectiveBits(), "bops": BitOperations()}
    options = dict.fromkeys(names, OPTIONS)
    tables = {name: cost_table(metric, geometries, options, storage, outside) for name, metric in metrics.items()}
    for shift in range(3):
        allocation = {name: OPTIONS[(5 * place + shift) % len(OPTIONS)] for place, name in enumerate(names)}
        expected = count(converted(model, allocation), IMAGE)
        assert tables["size_bytes"].total(allocation) == expected.size_bytes
        assert tables["bops"].total(allocation) == expected.bops
        assert tables["effective_bits"].total(allocation) == pytest.approx(expected.effective_bits)
        rows = {row.name: row.bops for row in expected.layers}
        assert {name: tables["bops"].layers[name][bits] for name, bits in allocation.items()} == rows


def test_what_is_fixed_does_not_depend_on_the_bits_that_the_model_has_now() -> None:
    model = Net()
    names = ["first", "second", "head"]
    plain = bytes_outside(model, names)
    assert plain == 4 * (5 + 4 * 5 + 3), "two biases and batch norm"
    assert bytes_outside(converted(model, dict.fromkeys(names, LayerBits(3, 4))), names) == plain


def test_layers_without_options_are_fixed_at_the_bits_that_they_have() -> None:
    model = converted(Net(), {"head": LayerBits(8, 8)})
    geometries, report = layer_geometries(model, IMAGE), count(model, IMAGE)
    options = {"first": [LayerBits(32, 32)], "second": [LayerBits(32, 32)]}
    storage = storage_of(Net())
    allocation = {name: LayerBits(32, 32) for name in options}
    for metric, expected in ((SizeBytes(), report.size_bytes), (BitOperations(), report.bops)):
        outside = bytes_outside(model, [one.name for one in geometries])
        table = cost_table(metric, geometries, options, storage, outside, rest=report.layers)
        assert table.total(allocation) == expected
    alone = cost_table(BitOperations(), geometries, options, storage, 0)
    assert alone.fixed == 15 * 32 * 32, "without a row the head is in full precision"


def test_a_codebook_is_as_wide_a_factor_as_its_entries() -> None:
    geometries = layer_geometries(Net(), IMAGE)
    bits = LayerBits(3, 8)
    options = {one.name: [bits] for one in geometries}
    table = cost_table(BitOperations(), geometries, options, codes_alone(geometries), 0, factor_bits=lambda *_: 32)
    assert table.total(dict.fromkeys(options, bits)) == sum(one.macs for one in geometries) * 32 * 8


def test_options_of_an_unknown_layer_are_refused() -> None:
    geometries = layer_geometries(Net(), IMAGE)
    with pytest.raises(ValueError, match="haed: no such layer"):
        cost_table(BitOperations(), geometries, {"haed": OPTIONS}, codes_alone(geometries), 0)


def test_a_query_reads_only_numbers() -> None:
    """A query is a look-up for each layer: no weight is quantized for it."""
    model = cifar_resnet20()
    geometries = layer_geometries(model, IMAGE)
    calls: list[str] = []

    def storage(layer: str, role: str, bits: int) -> int:
        calls.append(layer)
        return bits

    options = {one.name: OPTIONS for one in geometries}
    table = cost_table(SizeBytes(), geometries, options, storage, 0)
    before = len(calls)
    allocation = dict.fromkeys(options, OPTIONS[0])
    assert len({table.total(allocation) for _ in range(100)}) == 1
    assert len(calls) == before
