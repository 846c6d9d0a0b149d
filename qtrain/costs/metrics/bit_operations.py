"""Bit operations: what products cost on a machine whose units are as wide as their factors."""

from typing import final

from qtrain.costs.geometry import LayerGeometry
from qtrain.costs.metrics.base import CostMetric
from qtrain.spec import LayerBits


@final
class BitOperations(CostMetric):
    """``MACs * weight bits * input bits`` of one image (UNIQ, arXiv 1804.10969, without additions)."""

    unit = "bit operations"

    def layer(
        self, geometry: LayerGeometry, bits: LayerBits, weight_storage_bits: int, input_storage_bits: int
    ) -> float:
        return geometry.macs * bits.weight * bits.input

    def fixed(self, fixed_bytes: int) -> float:
        return 0.0
