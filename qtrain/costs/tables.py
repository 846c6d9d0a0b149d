"""The costs of all layers at all their options, worked out once, so that an allocation's cost is a sum of numbers."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from torch import nn

from qtrain.costs.count import CostReport, FurtherCost, LayerCost, plain_bytes, whole_bytes
from qtrain.costs.geometry import LayerGeometry
from qtrain.costs.metrics.base import CostMetric, MeasuredMetric
from qtrain.models.stored_weight import weight_tensors
from qtrain.nn.stored import stored_parts
from qtrain.spec import FULL_PRECISION, LayerBits
from qtrain.spec.allocation import CostTable, Role
from qtrain.utils.sharing import place_of

Storage = Callable[[str, Role, int], int]
"""(layer, role, bits) -> bits that its codes and scales take; for inputs, what the quantizer needs to run."""


def cost_table(
    metric: CostMetric,
    geometries: Sequence[LayerGeometry],
    options: Mapping[str, Sequence[LayerBits]],
    storage: Storage,
    fixed_bytes: int,
    *,
    factor_bits: Callable[[str, int], int] | None = None,
    rest: Iterable[LayerCost] = (),
) -> CostTable:
    """What each of ``options`` costs by ``metric``; all else is fixed.

    ``fixed_bytes`` are those of :func:`bytes_outside` for all ``geometries``. ``factor_bits`` (layer, bits) says how
    wide a factor a weight is where that is not its bits: a codebook's entries are floats. Layers without options have
    the bits and sizes of their row in ``rest``, as :func:`qtrain.costs.count.count` gives it, or else full precision.
    Raises ``ValueError`` for options of a layer that is none of ``geometries``.
    """
    known, rows = {geometry.name: geometry for geometry in geometries}, {row.name: row for row in rest}
    if unknown := [name for name in options if name not in known]:
        raise ValueError(f"options: {', '.join(unknown)}: no such layer among those that multiply")

    def cost(geometry: LayerGeometry, bits: LayerBits) -> float:
        name = geometry.name
        factors = bits if factor_bits is None else LayerBits(factor_bits(name, bits.weight), bits.input)
        return metric.layer(geometry, factors, storage(name, "weight", bits.weight), storage(name, "input", bits.input))

    def cost_of_rest(geometry: LayerGeometry) -> float:
        if row := rows.get(geometry.name):
            bits = LayerBits(row.weight_bits, row.input_bits)
            return metric.layer(geometry, bits, row.weight_storage_bits, row.input_storage_bits)
        return metric.layer(geometry, LayerBits(FULL_PRECISION, FULL_PRECISION), geometry.bits_in_float, 0)

    table = {name: {bits: cost(known[name], bits) for bits in choices} for name, choices in options.items()}
    others = sum(cost_of_rest(geometry) for geometry in geometries if geometry.name not in options)
    estimated = {
        name
        for name, choices in options.items()
        if isinstance(metric, MeasuredMetric) and not all(metric.measured(known[name], bits) for bits in choices)
    }
    return CostTable(metric.unit, metric.fixed(fixed_bytes) + others, table, frozenset(estimated))


def further_cost(
    metric: CostMetric, model: nn.Module, report: CostReport, geometries: Sequence[LayerGeometry]
) -> FurtherCost:
    """What ``model`` costs by ``metric`` at the bits it has, which ``report`` counts and ``geometries`` describe."""
    rows = {row.name: row for row in report.layers}
    bits = {name: LayerBits(row.weight_bits, row.input_bits) for name, row in rows.items()}

    def storage(layer: str, role: Role, _: int) -> int:
        return rows[layer].weight_storage_bits if role == "weight" else rows[layer].input_storage_bits

    options = {name: [both] for name, both in bits.items()}
    table = cost_table(metric, geometries, options, storage, bytes_outside(model, rows))
    layers = {name: of[bits[name]] for name, of in table.layers.items()}
    return FurtherCost(table.unit, table.total(bits), layers, table.estimated)


def bytes_outside(model: nn.Module, layers: Collection[str]) -> int:
    """Bytes of ``model``, as :func:`qtrain.costs.count.count` has them, without weights and input scales of ``layers``.

    Biases, batch norms and other layers are what is left. What a layer's weight is standardized with (a gain) is
    stored where the weight is not quantized, and counted as ``model`` has it now.
    """
    parts = stored_parts(model)
    modules = dict(model.named_modules())
    own = {place_of(one) for name in layers if name in modules for one in weight_tensors(modules[name])}
    plain = {name: tensor for name, tensor in parts.plain.items() if place_of(tensor) not in own}
    codes = 0
    for name, layer in parts.weights.items():
        if name not in layers and layer.weight_quantizer is not None:
            codes += whole_bytes(layer.weight_quantizer.quantize(layer.effective_weight()).nbits)
    scales = sum(
        whole_bytes(one.storage_bits())
        for name, one in parts.inputs.items()
        if name not in layers and name.rpartition(".")[0] not in layers  # both operands belong to a matrix product
    )
    return plain_bytes(plain) + codes + scales


def codes_alone(geometries: Iterable[LayerGeometry]) -> Storage:
    """Sizes without scales: each weight has its bits and nothing beside, as most papers count."""
    weights = {geometry.name: geometry.weights for geometry in geometries}
    return lambda layer, role, bits: bits * weights[layer] if role == "weight" else 0
