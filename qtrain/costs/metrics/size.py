"""The bytes of a model's file, and the bits that a weight takes in it."""

from typing import final

from qtrain.costs.count import whole_bytes
from qtrain.costs.geometry import LayerGeometry
from qtrain.costs.metrics.base import CostMetric
from qtrain.spec import LayerBits


@final
class SizeBytes(CostMetric):
    """Exact bytes, as the packed student has them: codes and scales of each tensor, rounded up to whole bytes."""

    unit = "bytes"

    def layer(
        self, geometry: LayerGeometry, bits: LayerBits, weight_storage_bits: int, input_storage_bits: int
    ) -> float:
        return whole_bytes(weight_storage_bits) + whole_bytes(input_storage_bits)

    def fixed(self, fixed_bytes: int) -> float:
        return fixed_bytes


@final
class EffectiveBits(CostMetric):
    """Stored bits of a weight, scales included, on average over the weights of all layers."""

    unit = "bits"

    def layer(
        self, geometry: LayerGeometry, bits: LayerBits, weight_storage_bits: int, input_storage_bits: int
    ) -> float:
        return geometry.share * weight_storage_bits / geometry.weights if geometry.weights else 0.0

    def fixed(self, fixed_bytes: int) -> float:
        return 0.0
