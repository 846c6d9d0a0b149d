"""What all metrics of cost have in common: a number for each layer and its bits, which add up to the model's."""

from abc import ABC, abstractmethod
from typing import ClassVar

from qtrain.costs.geometry import LayerGeometry
from qtrain.spec import LayerBits


class CostMetric(ABC):
    """What one image costs, or what the model itself does, as a sum over layers, in ``unit``."""

    unit: ClassVar[str]

    @abstractmethod
    def layer(
        self, geometry: LayerGeometry, bits: LayerBits, weight_storage_bits: int, input_storage_bits: int
    ) -> float:
        """The cost of one layer whose weight and input have ``bits`` as factors of its products.

        ``weight_storage_bits`` are codes and scales of the weight, 0 where they are stored with another layer;
        ``input_storage_bits`` are what the input's quantizer needs to run.
        """

    @abstractmethod
    def fixed(self, fixed_bytes: int) -> float:
        """The cost of what no layer owns: ``fixed_bytes`` of biases, batch norms and the like."""


class MeasuredMetric(CostMetric):
    """A metric that was measured for some layers and widths, and is estimated for the others."""

    @abstractmethod
    def measured(self, geometry: LayerGeometry, bits: LayerBits) -> bool:
        """Whether the number of this layer at ``bits`` comes from a measurement of its shape."""
