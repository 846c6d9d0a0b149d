"""The energy of one image on an accelerator: its operations, and the traffic of weights and activations."""

from typing import final

from qtrain.costs.geometry import LayerGeometry
from qtrain.costs.metrics.base import CostMetric
from qtrain.costs.technology import Technology
from qtrain.spec import LayerBits

MICRO = 1e-6
"""One pJ in uJ."""


@final
class Energy(CostMetric):
    """uJ of one image, by a table of operations (Horowitz, ISSCC 2014).

    ``MACs (multiply(w, a) + add) + DRAM(stored weights) + buffered(a * inputs)``

    A weight, codes and scales, is read from outside of the chip once for an image. A layer's input is written once, by
    the layer before, and read once: on the chip where the whole of it fits, otherwise outside. Registers feed the
    multipliers, and what they take counts as part of an operation, as are additions beside the products. A layer with
    one factor in floating point multiplies in floating point.
    """

    unit = "uJ"

    def __init__(self, *, technology: Technology, accumulator_bits: int = 32) -> None:
        self.technology, self.accumulator_bits = technology, accumulator_bits

    def layer(
        self, geometry: LayerGeometry, bits: LayerBits, weight_storage_bits: int, input_storage_bits: int
    ) -> float:
        made = geometry.macs * self.technology.product(bits.weight, bits.input, self.accumulator_bits)
        moved = self.technology.dram(weight_storage_bits) + self.technology.buffered(geometry.inputs * bits.input)
        return MICRO * (made + moved)

    def fixed(self, fixed_bytes: int) -> float:
        return MICRO * self.technology.dram(8 * fixed_bytes)
