"""The energy of one image on OLAccel, a 4-bit accelerator with few wide units for the few large values."""

import math
from typing import final

from qtrain.costs.geometry import LayerGeometry
from qtrain.costs.metrics.base import CostMetric
from qtrain.costs.metrics.energy import MICRO
from qtrain.costs.technology import Technology
from qtrain.spec import LayerBits
from qtrain.utils.checks import check_range


@final
class OLAccel(CostMetric):
    """uJ of one image on the outlier-aware accelerator of Park, Kim and Yoo (ISCA 2018).

    Weights and activations of at most ``unit_bits`` are multiplied in units of ``unit_bits``, apart from a share of
    outliers. An outlier among the weights has ``weight_outlier_bits`` and takes the unit that stands beside each group
    of ``group`` units for the further bits; its group stores ``group_bits`` for these, in use or not. A product with an
    outlier among the activations, of ``input_outlier_bits``, is computed in a wide unit instead, and the outlier is
    stored apart with ``input_index_bits`` that say where it belongs. Wider layers, the first one for instance, have no
    outliers and take the units several times: ``ceil(w / unit) ceil(a / unit)``. There is no floating point: weights
    have at most ``weight_outlier_bits``, activations ``input_outlier_bits``. Zeros are multiplied like other values.

    Raises ``ValueError`` for a share outside of 0 to 1.
    """

    unit = "uJ"

    def __init__(
        self,
        *,
        technology: Technology,
        accumulator_bits: int = 24,
        unit_bits: int = 4,
        weight_outliers: float = 0.03,
        weight_outlier_bits: int = 8,
        group: int = 16,
        group_bits: int = 16,
        input_outliers: float = 0.03,
        input_outlier_bits: int = 16,
        input_index_bits: int = 16,
    ) -> None:
        check_range("OLAccel", "[0, 1]", weight_outliers=weight_outliers, input_outliers=input_outliers)
        check_range("OLAccel", "[1, inf)", accumulator_bits=accumulator_bits, unit_bits=unit_bits, group=group)
        check_range("OLAccel", "[1, inf)", weight_outlier_bits=weight_outlier_bits)
        check_range("OLAccel", "[1, inf)", input_outlier_bits=input_outlier_bits)
        check_range("OLAccel", "[0, inf)", group_bits=group_bits, input_index_bits=input_index_bits)
        self.technology, self.accumulator_bits, self.unit_bits = technology, accumulator_bits, unit_bits
        self.weight_outliers, self.weight_outlier_bits = weight_outliers, weight_outlier_bits
        self.group, self.group_bits = group, group_bits
        self.input_outliers, self.input_outlier_bits = input_outliers, input_outlier_bits
        self.input_index_bits = input_index_bits

    def layer(
        self, geometry: LayerGeometry, bits: LayerBits, weight_storage_bits: int, input_storage_bits: int
    ) -> float:
        weight, input = min(bits.weight, self.weight_outlier_bits), min(bits.input, self.input_outlier_bits)
        stored = weight_storage_bits
        if weight < bits.weight:
            stored = min(stored, weight * geometry.weights)
        narrow_weight, narrow_input = weight <= self.unit_bits, input <= self.unit_bits
        weight_outliers = self.weight_outliers * narrow_weight
        input_outliers = self.input_outliers * narrow_input
        small = self._product(self.unit_bits, self.unit_bits)
        units = self._units(weight) * self._units(input)
        further = weight_outliers * self._units(self.weight_outlier_bits - self.unit_bits) * self._units(input)
        wide = self._product(max(weight, self.unit_bits), self.input_outlier_bits)
        made = geometry.macs * ((1 - input_outliers) * (units + further) * small + input_outliers * wide)
        groups = narrow_weight * geometry.weights / self.group
        apart = input_outliers * (self.input_outlier_bits + self.input_index_bits)
        moved = self.technology.dram(stored + groups * self.group_bits) + self.technology.buffered(
            geometry.inputs * (input + apart)
        )
        return MICRO * (made + moved)

    def fixed(self, fixed_bytes: int) -> float:
        return MICRO * self.technology.dram(8 * fixed_bytes)

    def _product(self, weight_bits: int, input_bits: int) -> float:
        return self.technology.product(weight_bits, input_bits, self.accumulator_bits)

    def _units(self, bits: int) -> int:
        return math.ceil(bits / self.unit_bits)
