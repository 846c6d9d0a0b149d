"""What a search over bit widths reads: how much each choice hurts, and what it costs. Plain numbers, no model."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Role = Literal["weight", "input"]


class LayerBits(NamedTuple):
    """Bit widths of one layer; ``FULL_PRECISION`` leaves the weight or the input in floating point."""

    weight: int
    input: int


Allocation = Mapping[str, LayerBits]
"""Bits of a model: qualified layer name -> LayerBits. What a manual config, a search and a trial all produce."""


class Choice(NamedTuple):
    """The weight or the input of one layer at so many bits."""

    layer: str
    role: Role
    bits: int


@dataclass(frozen=True)
class Scores:
    """How much the loss is expected to rise where one weight or one input alone is quantized.

    ``weight`` and ``input`` map layer -> bits -> rise, in the unit of the score (nats where it estimates a loss);
    only the order and the ratios count. A width that is not listed, such as full precision, counts 0. ``pairs`` is what
    two choices add together beyond their own (CLADO, arXiv 2307.05657); each pair is listed once.
    """

    weight: Mapping[str, Mapping[int, float]]
    input: Mapping[str, Mapping[int, float]]
    pairs: Mapping[tuple[Choice, Choice], float] = field(default_factory=dict)

    def of(self, layer: str, bits: LayerBits) -> float:
        """The rise for ``layer`` at ``bits``, pairs left out."""
        return self.weight.get(layer, {}).get(bits.weight, 0.0) + self.input.get(layer, {}).get(bits.input, 0.0)

    def with_weight_error(self, left: float) -> "Scores":
        """The same where only the part ``left`` of each weight's squared error stays; inputs keep theirs.

        A pair is the product of two errors, so that each weight in it has the root of ``left``.
        """
        weight = {layer: {bits: left * rise for bits, rise in of.items()} for layer, of in self.weight.items()}
        pairs = {
            pair: value * left ** (sum(choice.role == "weight" for choice in pair) / 2)
            for pair, value in self.pairs.items()
        }
        return Scores(weight, self.input, pairs)

    def total(self, allocation: Allocation) -> float:
        """The rise for all layers of ``allocation``, pairs included."""
        alone = sum(self.of(layer, bits) for layer, bits in allocation.items())
        return alone + sum(value for pair, value in self.pairs.items() if all(_chosen(c, allocation) for c in pair))


@dataclass(frozen=True)
class CostTable:
    """What a model costs by one metric: ``fixed``, and a number for each layer and each of its options, in ``unit``.

    The cost of an allocation is their sum. ``estimated`` are layers whose numbers are estimates where others were
    measured.
    """

    unit: str
    fixed: float
    layers: Mapping[str, Mapping[LayerBits, float]]
    estimated: frozenset[str] = frozenset()

    def total(self, allocation: Allocation) -> float:
        """The cost of ``allocation``, which names all these layers. Raises ``KeyError`` for an unknown option."""
        return self.fixed + sum(options[allocation[layer]] for layer, options in self.layers.items())


def _chosen(choice: Choice, allocation: Allocation) -> bool:
    bits = allocation.get(choice.layer)
    return bits is not None and getattr(bits, choice.role) == choice.bits
