"""Number formats of 4, 6 and 8 bits as the OCP Microscaling Formats (MX) specification 1.0 defines them, section 5.3.

Codes are bit patterns: sign, exponent, mantissa; of ``int8`` two's complement with 6 bits after the point.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import final

import torch
from torch import Tensor


@final
@dataclass(frozen=True)
class Element:
    """A format of ``bits`` bits, ``mantissa_bits`` of them after the leading one.

    ``smallest_exponent`` is that of the smallest normal number, below which steps stay the same (subnormal numbers);
    ``largest_exponent`` that of ``largest``, the largest finite number. ``fixed_point`` has no exponent.
    """

    bits: int
    mantissa_bits: int
    smallest_exponent: int
    largest_exponent: int
    largest: float
    fixed_point: bool = False

    @lru_cache  # noqa: B019 - six instances
    def magnitudes(self) -> Tensor:
        """All finite magnitudes in rising order, float32: that of place ``i`` has the code ``i``."""
        steps = 1 << self.mantissa_bits
        found: list[float] = []
        exponent = self.smallest_exponent
        found += [i / steps * 2.0**exponent for i in range(steps)]
        while exponent <= self.largest_exponent:
            found += [(1 + i / steps) * 2.0**exponent for i in range(steps)]
            exponent += 1
        return torch.tensor([value for value in found if value <= self.largest])

    def encode(self, values: Tensor) -> Tensor:
        """Codes, int32, of ``values``, float32, each of which is a number of this format."""
        table = self.magnitudes().to(values.device)
        place = torch.bucketize(values.abs().contiguous(), table).to(torch.int32)
        if self.fixed_point:
            return torch.where(values < 0, -place, place) & 0xFF
        return place + (values.signbit().to(torch.int32) << (self.bits - 1))

    def decode(self, codes: Tensor) -> Tensor:
        """The values that :meth:`encode` had, float32."""
        table = self.magnitudes().to(codes.device)
        negative = codes >> (self.bits - 1) == 1
        lower = codes & ((1 << (self.bits - 1)) - 1)
        place = torch.where(negative, 256 - codes, codes) if self.fixed_point else lower
        magnitude = table[place.to(torch.int64)]
        return torch.where(negative, -magnitude, magnitude)


ELEMENTS = {
    "e2m1": Element(4, 1, 0, 2, 6.0),
    "e2m3": Element(6, 3, 0, 2, 7.5),
    "e3m2": Element(6, 2, -2, 4, 28.0),
    "e4m3": Element(8, 3, -6, 8, 448.0),
    "e5m2": Element(8, 2, -14, 15, 57344.0),
    "int8": Element(8, 6, 0, 0, 127 / 64, fixed_point=True),
}
"""The specification's element formats by name: FP4, the two FP6, the two FP8, INT8."""
