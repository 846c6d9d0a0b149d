"""The silicon of an accelerator with units of its own for each layer."""

import math
from collections.abc import Sequence
from typing import final

from qtrain.costs.geometry import LayerGeometry
from qtrain.costs.metrics.base import CostMetric
from qtrain.costs.technology import at_width, check_points
from qtrain.spec import FULL_PRECISION, LayerBits
from qtrain.utils.checks import check_range

SQUARE_MILLI = 1e-6
"""One square micrometer in square millimeters."""


@final
class Area(CostMetric):
    """mm2 of a pipeline that has multipliers and adders of its own for each layer and holds all weights.

    ``ceil(MACs * images_per_second / clock_hz) (multiplier(w, a) + adder) + stored bits * sram_bit``

    The units of a layer are as many as keep up with ``images_per_second`` at a clock of ``clock_hz``. So a layer of
    fewer bits takes less silicon, whatever the others have, as in accelerators that are generated for a network
    (FINN, arXiv 1612.07119). Tables are in square micrometers by width. Raises ``ValueError`` for a table that is none.
    """

    unit = "mm2"

    def __init__(
        self,
        *,
        integer_add: Sequence[tuple[float, float]],
        integer_multiply: Sequence[tuple[float, float]],
        float_add: float,
        float_multiply: float,
        sram_bit: float,
        clock_hz: float,
        images_per_second: float,
        accumulator_bits: int = 32,
    ) -> None:
        check_points("integer_add", integer_add)
        check_points("integer_multiply", integer_multiply)
        check_range("Area", "(0, inf)", clock_hz=clock_hz, images_per_second=images_per_second)
        check_range("Area", "[0, inf)", float_add=float_add, float_multiply=float_multiply, sram_bit=sram_bit)
        check_range("Area", "[1, inf)", accumulator_bits=accumulator_bits)
        self.integer_add, self.integer_multiply = integer_add, integer_multiply
        self.float_unit, self.sram_bit = float_add + float_multiply, sram_bit
        self.macs_per_unit = clock_hz / images_per_second
        self.accumulator_bits = accumulator_bits

    def layer(
        self, geometry: LayerGeometry, bits: LayerBits, weight_storage_bits: int, input_storage_bits: int
    ) -> float:
        units = math.ceil(geometry.macs / self.macs_per_unit)
        return SQUARE_MILLI * (units * self._unit(bits) + (weight_storage_bits + input_storage_bits) * self.sram_bit)

    def fixed(self, fixed_bytes: int) -> float:
        return SQUARE_MILLI * 8 * fixed_bytes * self.sram_bit

    def _unit(self, bits: LayerBits) -> float:
        if max(bits) >= FULL_PRECISION:
            return self.float_unit
        multiplier = at_width(self.integer_multiply, math.sqrt(bits.weight * bits.input))
        return multiplier + at_width(self.integer_add, self.accumulator_bits)
