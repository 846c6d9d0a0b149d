"""A network of 16 or 64 bits is as long as its tensors, by the report, the metrics and the tables of a search."""

import pytest
import torch
from torch import nn

import qtrain
from qtrain.convert.bank import Widths, make_bank
from qtrain.convert.layers import find_layers
from qtrain.convert.plan import LayerPlan
from qtrain.costs.geometry import layer_geometries
from qtrain.costs.metrics.size import SizeBytes
from qtrain.costs.tables import bytes_outside, cost_table
from qtrain.observers.min_max import MinMax
from qtrain.quantizers.uniform.lsq import LSQ
from qtrain.spec import FULL_PRECISION

TYPES = {torch.float16: 2, torch.bfloat16: 2, torch.float32: 4, torch.float64: 8}
"""Type -> bytes."""


def make(dtype: torch.dtype) -> nn.Module:
    """64 + 32 weights and 8 + 4 biases."""
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).to(dtype)


@pytest.mark.parametrize(("dtype", "size"), TYPES.items())
def test_report_and_metrics_agree_with_the_tensors(dtype: torch.dtype, size: int) -> None:
    cost = qtrain.cost(make(dtype), torch.rand(1, 8), metrics=["size_bytes", "effective_bits"])
    assert cost.size_bytes == cost.fp_size_bytes == cost.metrics["size_bytes"].total == size * 108
    assert cost.effective_bits == cost.metrics["effective_bits"].total == 8 * size
    assert [row.weight_storage_bits for row in cost.layers] == [8 * size * 64, 8 * size * 32]


@pytest.mark.parametrize(("dtype", "size"), TYPES.items())
def test_a_table_without_rows_has_the_type_of_other_layers(dtype: torch.dtype, size: int) -> None:
    model = make(dtype)
    geometries = layer_geometries(model, torch.rand(1, 8, dtype=dtype))
    assert [one.bits_in_float for one in geometries] == [8 * size * 64, 8 * size * 32]
    table = cost_table(SizeBytes(), geometries, {}, lambda *_: 0, bytes_outside(model, ["0", "2"]))
    assert table.fixed == size * 108


@pytest.mark.parametrize(("dtype", "size"), TYPES.items())
def test_a_bank_has_the_type_of_a_weight_that_is_not_quantized(dtype: torch.dtype, size: int) -> None:
    model, images = make(dtype).eval(), torch.rand(4, 8, dtype=dtype)
    recipe = LayerPlan(weight=LSQ, input=LSQ, weight_observer=MinMax, input_observer=MinMax)
    bank = make_bank(model, find_layers(model, images[:1]), recipe, Widths((4, FULL_PRECISION), (8,)), [images])
    assert bank.storage_bits("0", "weight", FULL_PRECISION) == 8 * size * 64
    assert bank.storage_bits("0", "weight", 4) == 4 * 64 + 32, "codes, and one scale"
