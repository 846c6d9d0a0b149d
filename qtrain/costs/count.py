"""Size and arithmetic of a model, exact, layer by layer; converted or not.

Two metrics decide whether a low-bit student was worth its training: the bytes that have to be stored, with the scales
that decode them, and the bit operations of one image. Both follow from the model alone, so they are counted here once,
for the closing table, the report and every search over bit widths.

- Size: a quantized weight counts ``QTensor.nbits`` (codes, scales, codebooks, outliers), an input quantizer the state
  that it needs to run, everything else of the state dict (other parameters, batch-norm statistics) its own type. Each
  tensor is rounded up to whole bytes, and one that is shared counts once. The student's file is as long, plus a header.
  A weight that is computed from others (parametrized, weight or spectral norm) counts by these, as they are stored.
- MACs: multiply-accumulates of convolutions and matrix products for one image; additions of biases, normalizations and
  activations are not counted, as usual in the field. Neither are distances (``torch.cdist``), Fourier transforms, and
  operators that are not torch's own.
- Bit operations: ``MACs * weight bits * input bits``, 32 for a floating-point side (the product term of Baskin et al.,
  UNIQ, arXiv 1804.10969; the accumulator's additions are left out). What counts is the width of a factor of the
  product, so a weight that is looked up in a codebook of floats counts 32, however few bits its index has.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from qtrain.costs.products import Products, count_products, multiplying_layers
from qtrain.models.stored_weight import bits_as_they_are, stored_weights, weight_shape
from qtrain.nn import QuantLayer, QuantWeighted
from qtrain.nn.operations import MatMul
from qtrain.nn.stored import full_precision_state, stored_parts
from qtrain.quantizers.base import Quantizer
from qtrain.spec import FULL_PRECISION

OUTSIDE_LAYERS = "(outside layers)"
"""Name of the row for matrix products that no layer owns, such as those of attention."""


@dataclass(frozen=True)
class LayerCost:
    """One convolution or linear layer, for one image; ``shape`` is the weight's.

    ``weight_bits`` and ``input_bits`` are those of the factors. ``weight_storage_bits`` are codes and scales of the
    weight, ``input_storage_bits`` the scales of the input quantizer; ``bops`` are ``macs * weight_bits * input_bits``.
    A weight that is stored with another layer has no ``weights`` and no ``weight_storage_bits`` here.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    weights: int
    macs: int
    weight_bits: int
    input_bits: int
    weight_storage_bits: int
    input_storage_bits: int

    @property
    def effective_bits(self) -> float:
        """Stored bits per weight, scales included; 0 for a row without weights."""
        return self.weight_storage_bits / self.weights if self.weights else 0.0

    @property
    def bops(self) -> int:
        return self.macs * self.weight_bits * self.input_bits


@dataclass(frozen=True)
class FurtherCost:
    """What a model costs by one more metric, in ``unit``: the ``total``, and each of the ``layers`` alone.

    The total is more than the sum of the layers where no layer owns a part, such as the biases. ``estimated`` are
    layers whose numbers were not measured, of a metric that is measured.
    """

    unit: str
    total: float
    layers: Mapping[str, float]
    estimated: frozenset[str] = frozenset()


@dataclass(frozen=True)
class CostReport:
    """Totals of a model and the rows they are made of, in the order in which the layers run.

    Sizes are in bytes, of the whole model; ``fp_`` metrics are those of the same model before conversion. ``metrics``
    are those that were asked for beyond these.
    """

    layers: tuple[LayerCost, ...]
    size_bytes: int
    fp_size_bytes: int
    metrics: Mapping[str, FurtherCost] = field(default_factory=dict)

    @property
    def compression(self) -> float:
        """How many times smaller than full precision."""
        return self.fp_size_bytes / self.size_bytes if self.size_bytes else 1.0

    @property
    def effective_bits(self) -> float:
        """Stored bits per weight over all convolutions and linear layers, scales included."""
        weights = sum(layer.weights for layer in self.layers)
        return sum(layer.weight_storage_bits for layer in self.layers) / weights if weights else 0.0

    @property
    def macs(self) -> int:
        return sum(layer.macs for layer in self.layers)

    @property
    def bops(self) -> int:
        return sum(layer.bops for layer in self.layers)

    @property
    def fp_bops(self) -> int:
        return self.macs * FULL_PRECISION**2

    def __str__(self) -> str:
        """A row for each layer, and the totals."""
        heads = tuple(f"{name}, {one.unit}" for name, one in self.metrics.items())
        rows: list[tuple[str, ...]] = [("layer", "kind", "weights", "bits", "bytes", "MACs", "bit operations", *heads)]
        for layer in self.layers:
            size = whole_bytes(layer.weight_storage_bits) + whole_bytes(layer.input_storage_bits)
            bits = f"W{layer.weight_bits}A{layer.input_bits}"
            numbers = (layer.weights, bits, size, layer.macs, layer.bops)
            further = (f"{one.layers.get(layer.name, 0.0):,.6g}" for one in self.metrics.values())
            rows.append((layer.name, layer.kind, *(n if isinstance(n, str) else f"{n:,}" for n in numbers), *further))
        totals = (f"{one.total:,.6g}" for one in self.metrics.values())
        total = ("", f"{self.size_bytes:,}", f"{self.macs:,}", f"{self.bops:,}", *totals)
        rows.append(("total", f"{self.compression:.1f}x smaller than {self.fp_size_bytes:,}", "", *total))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = (
            [cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
            for row in rows
        )
        return "\n".join("  ".join(cells).rstrip() for cells in lines)

    def as_dict(self) -> dict[str, Any]:
        """Plain values under the names that ``summary.json`` uses, the rows as a list of dicts under ``layers``.

        Further metrics stand beside them, by their totals.
        """
        totals = ("size_bytes", "fp_size_bytes", "compression", "effective_bits", "macs", "bops", "fp_bops")
        rows = [
            asdict(layer) | {"shape": list(layer.shape), "effective_bits": layer.effective_bits, "bops": layer.bops}
            for layer in self.layers
        ]
        further = {name: one.total for name, one in self.metrics.items()}
        return {name: getattr(self, name) for name in totals} | further | {"layers": rows}


def count(model: nn.Module, example: Tensor, products: Products | None = None) -> CostReport:
    """What ``model`` costs on images like ``example`` (N, C, H, W); arithmetic is given for one image.

    Runs one forward in eval mode without gradient and leaves the model as it was. A quantizer counts whether or not
    it is enabled at the moment. Call it on the plain module, before ``torch.compile``. Raises ``ValueError`` where a
    quantized weight is not finite. ``products`` are those of :func:`count_products` for a model that differs at most in
    bits, where they are known.
    """
    macs, outside = products or count_products(model, example)
    rows = _rows(model, macs)
    called = [rows[name] for name in macs]
    layers = called + [row for name, row in rows.items() if name not in macs]
    if outside:
        layers.append(
            LayerCost(
                name=OUTSIDE_LAYERS,
                kind="matmul",
                shape=(),
                weights=0,
                macs=outside,
                weight_bits=FULL_PRECISION,
                input_bits=FULL_PRECISION,
                weight_storage_bits=0,
                input_storage_bits=0,
            )
        )
    size_bytes, fp_size_bytes = _sizes(model, rows)
    return CostReport(layers=tuple(layers), size_bytes=size_bytes, fp_size_bytes=fp_size_bytes)


def _rows(model: nn.Module, macs: dict[str, int]) -> dict[str, LayerCost]:
    """The row of every layer by its name; a weight or a quantizer that several of them have counts for the first."""
    rows: dict[str, LayerCost] = {}
    seen: set[Quantizer] = set()
    stored = stored_weights(multiplying_layers(model))
    for name, module in multiplying_layers(model):
        inputs = [one for one in _input_quantizers(module) if one is not None]
        bits = sum(one.storage_bits() for one in dict.fromkeys(inputs) if one not in seen)
        rows[name] = _layer_cost(name, module, macs.get(name, 0), stored[name], bits)
        seen.update(inputs)
    return rows


def _layer_cost(
    name: str, module: nn.Module, macs: int, stored: Sequence[Tensor], input_storage_bits: int
) -> LayerCost:
    """The row of a layer, which stores the tensors ``stored`` of its weight."""
    weight_storage = bits_as_they_are(stored)
    input_bits, *right = (FULL_PRECISION if one is None else int(one.bits) for one in _input_quantizers(module))
    weight_bits = right[0] if right else FULL_PRECISION
    if isinstance(module, QuantWeighted) and module.weight_quantizer is not None:
        with torch.no_grad():
            codes = module.weight_quantizer.quantize(module.effective_weight())
        weight_bits, weight_storage = codes.operand_bits, codes.nbits if stored else 0
    shape = weight_shape(module)
    return LayerCost(
        name=name,
        kind=kind_of(module),
        shape=shape,
        weights=math.prod(shape) if stored else 0,
        macs=macs,
        weight_bits=weight_bits,
        input_bits=input_bits,
        weight_storage_bits=weight_storage,
        input_storage_bits=input_storage_bits,
    )


def _input_quantizers(module: nn.Module) -> tuple[Quantizer | None, ...]:
    """What quantizes the factors of a layer that are no weight: of a matrix product the left and the right one."""
    if isinstance(module, MatMul):
        return module.left.input_quantizer, module.right.input_quantizer
    return (module.input_quantizer if isinstance(module, QuantLayer) else None,)


def kind_of(module: nn.Module) -> str:
    """What a layer that multiplies is called in reports: ``conv2d``, ``linear``, ``matmul`` and so on."""
    if isinstance(module, MatMul):
        return "matmul"
    if isinstance(module, nn.Linear | nn.Embedding):
        return "linear" if isinstance(module, nn.Linear) else "embedding"
    assert isinstance(module, _ConvNd)
    transposed = "_transpose" if isinstance(module, _ConvTransposeNd) else ""
    return f"conv{transposed}{len(module.kernel_size)}d"


def _sizes(model: nn.Module, rows: dict[str, LayerCost]) -> tuple[int, int]:
    """Bytes of the model as it is stored, and of the same model in full precision; each tensor in whole bytes."""
    parts = stored_parts(model)
    codes = sum(whole_bytes(rows[name].weight_storage_bits) for name in parts.weights)
    scales = sum(whole_bytes(quantizer.storage_bits()) for quantizer in parts.inputs.values())
    return codes + scales + plain_bytes(parts.plain), plain_bytes(full_precision_state(model))


def plain_bytes(state: Mapping[str, Tensor]) -> int:
    """The bytes of tensors that are stored as they are."""
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def whole_bytes(bits: int) -> int:
    """The bytes that ``bits`` take in a file."""
    return -(-bits // 8)
