"""The energy of one operation and of one access to memory in a semiconductor process: a table, and how it scales."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import final

from qtrain.spec import FULL_PRECISION

Points = Sequence[tuple[float, float]]
"""(bits, cost of one operation of so many bits), by rising bits; at least two."""


def at_width(points: Points, bits: float) -> float:
    """The cost at ``bits``: a power of the width through the two nearest of ``points``, also beyond the last ones.

    ``cost = a bits^p``. An array multiplier of w by v bits has w v full adders, so that its cost is near
    ``bits^2`` at ``bits = sqrt(w v)``, and that of an adder near ``bits``; the published points say how near.
    """
    low, high = next((pair for pair in pairwise(points) if bits <= pair[1][0]), (points[-2], points[-1]))
    power = math.log(high[1] / low[1]) / math.log(high[0] / low[0])
    cost: float = low[1] * (bits / low[0]) ** power
    return cost


def check_points(name: str, points: Points) -> None:
    """Raises ``ValueError`` where ``points``, the option ``name``, are no table of rising bits and positive costs."""
    widths, costs = [bits for bits, _ in points], [cost for _, cost in points]
    above = all(0 < value < math.inf for value in (*widths, *costs))
    if len(points) < 2 or widths != sorted(set(widths)) or not above:
        raise ValueError(f"{name}: needs two or more pairs [bits, cost], bits rising, all above 0, got {points}")


@final
@dataclass(frozen=True, kw_only=True)
class Technology:
    """Energies in pJ: integer additions and multiplications by width, those of 32-bit floats, accesses to memory.

    ``sram_access`` and ``dram_access`` move ``access_bits`` between the processor and a memory on the chip of
    ``sram_bytes``, or outside of it. Raises ``ValueError`` for a table that is none, and for costs that are negative or
    not finite.
    """

    integer_add: Sequence[tuple[float, float]]
    integer_multiply: Sequence[tuple[float, float]]
    float_add: float
    float_multiply: float
    sram_bytes: int
    sram_access: float
    dram_access: float
    access_bits: int

    def __post_init__(self) -> None:
        check_points("integer_add", self.integer_add)
        check_points("integer_multiply", self.integer_multiply)
        for name in ("float_add", "float_multiply", "sram_bytes", "sram_access", "dram_access"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: must be a finite number of at least 0, got {getattr(self, name)}")
        if not 1 <= self.access_bits < math.inf:
            raise ValueError(f"access_bits: must be at least 1, got {self.access_bits}")

    def product(self, weight_bits: int, input_bits: int, accumulator_bits: int) -> float:
        """pJ of one multiply-accumulate; in floating point where one of the factors is."""
        if max(weight_bits, input_bits) >= FULL_PRECISION:
            return self.float_multiply + self.float_add
        multiply = at_width(self.integer_multiply, math.sqrt(weight_bits * input_bits))
        return multiply + at_width(self.integer_add, accumulator_bits)

    def dram(self, bits: float) -> float:
        """pJ to read or write ``bits`` outside of the chip."""
        return self.dram_access * bits / self.access_bits

    def buffered(self, bits: float) -> float:
        """pJ to write ``bits`` and read them again: on the chip where they fit there, otherwise outside of it."""
        access = self.sram_access if bits <= 8 * self.sram_bytes else self.dram_access
        return 2 * access * bits / self.access_bits
