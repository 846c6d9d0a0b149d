"""Statistics of tensors that merge exactly: counts in bins that are fixed before any data is seen.

The bins are those of the float format itself: sign, exponent and the first five bits of the mantissa. They cover
2^-32 to 2^32 with a relative width of 1/32, need no range beforehand, and two histograms merge by integer addition,
so that what two ranks saw equals what one rank would have seen.
"""

from __future__ import annotations

import torch
from torch import Tensor

MANTISSA_BITS = 5
EXPONENTS = 64
HALF = EXPONENTS << MANTISSA_BITS
BINS = 2 * HALF
_SHIFT = 23 - MANTISSA_BITS
_FIRST = (127 - EXPONENTS // 2) << MANTISSA_BITS


def float_histogram(x: Tensor) -> Tensor:
    """Counts of ``x`` (G, n) in the float bins: (G, BINS) int64.

    Bins ``[0, HALF)`` are the magnitudes of non-negative values in rising order, ``[HALF, 2 HALF)`` those of negative
    ones. Magnitudes below 2^-32, zero among them, fall into the first bin of their half, those above 2^32 into the last.
    """
    pattern = x.detach().float().contiguous().view(torch.int32)
    magnitude = ((pattern & 0x7FFFFFFF) >> _SHIFT).sub_(_FIRST).clamp_(0, HALF - 1)
    index = torch.where(pattern < 0, magnitude + HALF, magnitude).long()
    groups = index.shape[0]
    index += torch.arange(groups, device=index.device).unsqueeze(1) * BINS
    return torch.bincount(index.reshape(-1), minlength=groups * BINS).reshape(groups, BINS)


def bin_centres(device: torch.device | None = None) -> Tensor:
    """The value that stands for each bin, (BINS,) float32: the middle of its interval, 0 for the first of each half."""
    pattern = (torch.arange(HALF, device=device, dtype=torch.int32) + _FIRST) << _SHIFT
    centres = (pattern + (1 << (_SHIFT - 1))).view(torch.float32)
    centres[0] = 0.0
    return torch.cat([centres, -centres])
