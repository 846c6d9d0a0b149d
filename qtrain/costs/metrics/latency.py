"""The time of one image, from what was measured on a machine, or from the limits of one that nobody has."""

from collections.abc import Sequence
from typing import final

from qtrain.costs.geometry import LayerGeometry
from qtrain.costs.latency_table import in_float, narrowest, read_table
from qtrain.costs.metrics.base import MeasuredMetric
from qtrain.spec import FULL_PRECISION, LayerBits
from qtrain.utils.checks import check_range

MICRO = 1e6
"""Microseconds of a second."""


def roofline(macs: float, moved_bytes: float, macs_per_second: float, bytes_per_second: float) -> float:
    """Microseconds at least: as long as the slower of multiplying and moving takes (Williams et al. 2009)."""
    return MICRO * max(macs / macs_per_second, moved_bytes / bytes_per_second)


@final
class Latency(MeasuredMetric):
    """us of one image by the table that ``task=profile`` wrote.

    The layers' times are added, and so is the table's ``rest``, that of its network at the fewest bits. A layer of bits
    without a kernel takes as long as in the next wider one, since that is where a runtime computes it. Where the shape
    is not in the table, the time is a roofline by the table's own peaks, and estimated; so is a weight of few bits
    beside an input in floating point, whose decoding is not counted.

    ``macs_per_second``, pairs (bits, multiplications a second) by rising bits, are kernels that the machine does not
    have: layers whose two factors have at most so many bits take a roofline by these, with ``bytes_per_second`` of the
    table where that is ``None``. All of it is estimated.

    Raises ``ValueError`` where ``table`` is no such file, or a speed is not above 0.
    """

    unit = "us"

    def __init__(
        self, *, table: str, macs_per_second: Sequence[tuple[int, float]] = (), bytes_per_second: float | None = None
    ) -> None:
        self.table = read_table(table)
        check_range("Latency", "(0, inf)", bytes_per_second=bytes_per_second)
        pairs = all(isinstance(kernel, Sequence) and len(kernel) == 2 and min(kernel) > 0 for kernel in macs_per_second)
        if not pairs or (widths := [bits for bits, _ in macs_per_second]) != sorted(set(widths)):
            raise ValueError(
                "Latency: macs_per_second must be pairs [bits, multiplications a second], bits rising, all above 0, "
                f"got {macs_per_second}"
            )
        self.kernels = tuple(macs_per_second)
        self.bytes_per_second = self.table.bytes_per_second if bytes_per_second is None else bytes_per_second

    def layer(
        self, geometry: LayerGeometry, bits: LayerBits, weight_storage_bits: int, input_storage_bits: int
    ) -> float:
        if not geometry.macs:
            return 0.0
        if (speed := self._kernel(bits)) is not None:
            return roofline(geometry.macs, _moved(geometry, bits), speed, self.bytes_per_second)
        if (time := self.table.time(geometry, bits)) is not None:
            return geometry.calls * time.us
        peak = narrowest(self.table.peaks, bits) or min(self.table.peaks.values())
        return roofline(geometry.macs, _moved(geometry, bits), peak, self.table.bytes_per_second)

    def fixed(self, fixed_bytes: int) -> float:
        return self.table.rest[min(self.table.rest)] if self.table.rest else 0.0

    def measured(self, geometry: LayerGeometry, bits: LayerBits) -> bool:
        half = in_float(bits) and min(bits) < FULL_PRECISION
        known = self.table.time(geometry, bits) is not None
        return not geometry.macs or (self._kernel(bits) is None and known and not half)

    def _kernel(self, bits: LayerBits) -> float | None:
        """Multiplications a second of the narrowest assumed kernel with room for both factors."""
        return next((speed for width, speed in self.kernels if max(bits) <= width), None)


def _moved(geometry: LayerGeometry, bits: LayerBits) -> float:
    """Bytes that the layer reads and writes at least: weights, inputs, and outputs as wide as the inputs."""
    return (geometry.weights * bits.weight + (geometry.inputs + geometry.outputs) * bits.input) / 8
