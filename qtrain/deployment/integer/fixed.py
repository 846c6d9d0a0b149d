"""Numbers as integers times a scale that is known before any image is seen, and the change from one scale to another.

A factor between two scales is a whole number and a shift, ``m 2^-n`` (Jacob et al. 2018, arXiv 1712.05877, §2.2), so no
floating-point number and no division meets an activation. Each tensor carries the largest magnitude that it can have,
from which it is proved, and not hoped, that nothing overflows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

ACCUMULATOR = 31
"""Bits of the magnitude of a product's sums, which hardware keeps in 32 bits."""

CODE = 17
"""Bits of the magnitude of the widest codes, whose zero point is taken off."""

EXACT = 52
"""Bits of the magnitude of sums that float64 carries out without rounding."""

WIDE = 36
"""Bits of the magnitude of numbers between the layers, where the student itself has not rounded them."""

PRODUCT = 61
"""Bits of the magnitude of two activations' product before it is rounded."""

_WORD = 62
"""Bits of the magnitude of a number that is multiplied by a factor before it is shifted."""


@dataclass(frozen=True)
class Fixed:
    """``numbers scale``: ``numbers`` int64 of magnitude at most ``bound``, ``scale`` positive float64.

    ``scale`` broadcasts against the numbers: one for all, or one for each channel.
    """

    numbers: Tensor
    scale: Tensor
    bound: int

    def __post_init__(self) -> None:
        assert self.numbers.dtype == torch.int64 and self.scale.dtype == torch.float64
        if self.bound.bit_length() > _WORD:
            raise OverflowError(f"numbers of {self.bound.bit_length()} bits do not fit {_WORD}")

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.numbers.shape)


def multiplied(numbers: Tensor, factor: Tensor, bound: int) -> Tensor:
    """``numbers factor`` rounded to the nearest integer, a tie to the even one; ``factor`` float64, nonnegative.

    ``factor`` becomes ``m 2^-n`` with ``m`` as long as 63 bits allow beside numbers of magnitude ``bound``: its
    relative error is at most ``2^-(62 - bits)``.
    """
    m, n = dyadic(factor, _WORD - bound.bit_length())
    product = numbers * m
    if bool((n < 0).any()):
        product <<= (-n).clamp(min=0)
    n = n.clamp(min=0)
    half = (torch.ones_like(n) << n) >> 1
    if bool((half > (m & -m) << bound.bit_length()).all()):  # no product but 0 has so many factors of two: no ties
        product += half
        product >>= n
        return product
    # A half is added, or one less where the whole part is even, so that a tie goes to the even number.
    rounded = product >> n
    rounded &= (half > 0).to(torch.int64)
    rounded += product
    rounded += (half - 1).clamp(min=0)
    rounded >>= n
    return rounded


def dyadic(factor: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """``m`` and ``n``, int64, with ``factor = m 2^-n`` but for rounding and ``m < 2^bits``; ``n`` at most 62."""
    _, exponent = torch.frexp(factor)
    n = (bits - exponent.to(torch.int64)).clamp(max=_WORD)
    m = torch.ldexp(factor, n.to(torch.int32)).round().to(torch.int64)
    over = m >= 2**bits
    return torch.where(over, m // 2, m), torch.where(over, n - 1, n)


def rescaled(x: Fixed, scale: Tensor, *, bits: int = WIDE) -> Fixed:
    """``x`` in units of ``scale``, rounded to the nearest."""
    x = narrowed(x, WIDE)  # which leaves the factor enough bits
    factor = x.scale / scale
    bound = int(x.bound * float(factor.max())) + 1
    if bound.bit_length() > bits + 1:
        raise OverflowError(f"numbers of {bound.bit_length()} bits do not fit {bits}")
    return Fixed(multiplied(x.numbers, factor, x.bound), scale, bound)


def uniform(x: Fixed) -> Fixed:
    """``x`` with one scale for all numbers."""
    if x.scale.numel() == 1:
        return Fixed(x.numbers, x.scale.reshape(()), x.bound)
    return rescaled(x, unit(x))


def unit(*values: Fixed) -> Tensor:
    """The scale, a power of two, in which the sum of ``values`` just fits :data:`WIDE` bits."""
    reach = sum(x.bound * float(x.scale.max()) for x in values)
    _, exponent = torch.frexp(torch.tensor(reach, dtype=torch.float64))
    return torch.ldexp(torch.ones((), dtype=torch.float64), exponent - WIDE)


def constant(values: Tensor, scale: Tensor) -> Fixed:
    """``values``, floating point, as the nearest multiples of ``scale``."""
    numbers = (values.double() / scale).round()
    bound = int(numbers.abs().max()) if numbers.numel() else 0
    return Fixed(numbers.to(torch.int64), scale, bound)


def of_values(values: Tensor, *, bits: int = 24) -> Fixed:
    """A constant of the network, in a power of two that gives the largest of ``values`` that many bits."""
    largest = float(values.abs().max()) or 1.0
    _, exponent = torch.frexp(torch.tensor(largest, dtype=torch.float64))
    return constant(values, torch.ldexp(torch.ones((), dtype=torch.float64), exponent - bits))


def shifted(x: Fixed, values: Tensor) -> Fixed:
    """``x + values`` with constants that are rounded to a small share of the scale."""
    largest = x.bound + int((values.abs().double() / x.scale).max()) + 1
    fraction = max(0, WIDE - largest.bit_length())
    scale = x.scale / 2**fraction
    added = constant(values, scale)
    return Fixed((x.numbers << fraction) + added.numbers, scale, (x.bound << fraction) + added.bound)


def scaled(x: Fixed, values: Tensor) -> Fixed:
    """``x values`` with constants, one or one for each channel: the numbers stay, the scale changes."""
    values = values.double()
    if values.numel() == 1 and values.ndim:
        values = values.reshape(())
    sign = torch.where(values < 0, -1, 1)
    magnitude = values.abs()
    live = magnitude > 0
    numbers = x.numbers * sign * live
    return Fixed(numbers, x.scale * torch.where(live, magnitude, torch.ones_like(magnitude)), x.bound)


def summed(left: Fixed, right: Fixed) -> Fixed:
    if _alike(left.scale, right.scale):
        return Fixed(left.numbers + right.numbers, left.scale, left.bound + right.bound)
    scale = unit(left, right)
    left, right = rescaled(left, scale), rescaled(right, scale)
    return Fixed(left.numbers + right.numbers, scale, left.bound + right.bound)


def _alike(left: Tensor, right: Tensor) -> bool:
    """Whether two scales are the same but for float32's rounding, as those of a product and of its bias are."""
    if torch.broadcast_shapes(left.shape, right.shape).numel() != left.numel() or left.numel() != right.numel():
        return False
    return torch.allclose(left, right, rtol=2.0**-22, atol=0)


def narrowed(x: Fixed, bits: int) -> Fixed:
    """``x`` in at most ``bits`` bits."""
    over = x.bound.bit_length() - bits
    if over <= 0:
        return x
    numbers = multiplied(x.numbers, torch.tensor(2.0**-over, dtype=torch.float64), x.bound)
    return Fixed(numbers, x.scale * 2**over, (x.bound >> over) + 1)


def widened(x: Fixed) -> Fixed:
    """``x`` in units that are finer by a power of two, up to :data:`WIDE` bits."""
    fraction = max(0, WIDE - x.bound.bit_length())
    return Fixed(x.numbers << fraction, x.scale / 2**fraction, x.bound << fraction)
