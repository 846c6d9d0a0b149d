"""Reciprocals, and those of square roots, of integers that are known only when the network runs, without a division.

A number is brought to a mantissa of 31 bits by shifts. A table of its leading bits gives a first value, and two steps
of Newton's iteration, products and shifts alone, double its correct bits twice. I-BERT (Kim et al. 2021, arXiv
2101.01321, §3.5) iterates in the same way, but divides in each step.
"""

import torch
from torch import Tensor

MANTISSA = 31
"""Bits of a mantissa."""

FRACTION = 30
"""Bits behind the point of the results, which lie in (1, 2]: their relative error is below ``2^-28``."""

_INDEX = 22
"""Bits of a mantissa that its place in the table does not depend on."""


def bit_length(values: Tensor) -> Tensor:
    """Bits of each of ``values``, int64 and not negative, as ``int.bit_length`` counts them."""
    left, length = values, torch.zeros_like(values)
    for step in (32, 16, 8, 4, 2, 1):
        longer = (left >> step > 0).to(torch.int64)
        length += step * longer
        left = left >> (step * longer)
    return length + (left > 0).to(torch.int64)


def moved(values: Tensor, right: Tensor) -> Tensor:
    """``values 2^-right`` rounded to the nearest, with ``right`` up to 62; a negative one moves to the left."""
    left, right = (-right).clamp(min=0), right.clamp(0, 62)
    half = (torch.ones_like(right) << right) >> 1
    return ((values << left) + half) >> right


def reciprocal(values: Tensor) -> tuple[Tensor, Tensor]:
    """``r`` and ``e`` with ``1 / values = r 2^-(30 + e)``, ``r`` in [2^30, 2^31]; ``values`` int64 from 1 to 2^62."""
    exponent = bit_length(values)
    u = moved(values, exponent - MANTISSA).clamp(max=2**MANTISSA - 1)  # in [1/2, 1), 31 bits behind the point
    r = _RECIPROCALS[(u >> _INDEX) - 2 ** (MANTISSA - 1 - _INDEX)]
    for _ in range(2):  # r (2 - u r)
        r = (r * ((2**62 - u * r) >> MANTISSA)) >> FRACTION
    return r.clamp(max=2**MANTISSA), exponent


def reciprocal_root(values: Tensor) -> tuple[Tensor, Tensor]:
    """``r`` and ``e`` with ``1 / sqrt(values) = r 2^-(30 + e)``, ``r`` in [2^30, 2^31]; ``values`` as there."""
    half = (bit_length(values) + 1) >> 1
    u = moved(values, 2 * half - MANTISSA).clamp(max=2**MANTISSA - 1)  # in [1/4, 1), 31 bits behind the point
    r = _ROOTS[(u >> _INDEX) - 2 ** (MANTISSA - 2 - _INDEX)]
    for _ in range(2):  # r (3 - u r^2) / 2
        r = (r * ((3 * 2**60 - u * ((r * r) >> MANTISSA)) >> MANTISSA)) >> FRACTION
    return r.clamp(max=2**MANTISSA), half


def _middles(lowest: float) -> Tensor:
    """The middles of the table's intervals from ``lowest`` to 1."""
    width = 2.0 ** (_INDEX - MANTISSA)
    return torch.arange(lowest, 1, width, dtype=torch.float64) + width / 2


_RECIPROCALS = (2**FRACTION / _middles(0.5)).round().to(torch.int64)
_ROOTS = (2**FRACTION / _middles(0.25).sqrt()).round().to(torch.int64)
