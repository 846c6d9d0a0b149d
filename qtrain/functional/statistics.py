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
_PATTERNS = 256 << MANTISSA_BITS
_ROWS = 256


def float_histogram(x: Tensor) -> Tensor:
    """Counts of ``x`` (G, n) in the float bins: (G, BINS) int64.

    Bins ``[0, HALF)`` are the magnitudes of non-negative values in rising order, ``[HALF, 2 HALF)`` those of negative
    ones. Magnitudes below 2^-32, zero among them, fall into the first bin of their half, those above 2^32 into the
    last.
    """
    # Counting every exponent first and cropping the counts costs three passes over the data instead of eight.
    return torch.cat([_cropped(_pattern_counts(rows)) for rows in x.detach().float().split(_ROWS)])


def _pattern_counts(x: Tensor) -> Tensor:
    """Counts by leading bits: (G, 2, PATTERNS), negative values first, each half in rising magnitude."""
    groups = x.shape[0]
    index = (x.contiguous().view(torch.int32) >> _SHIFT) + _PATTERNS
    if groups > 1:
        index += torch.arange(groups, device=x.device, dtype=torch.int32).unsqueeze(1) * (2 * _PATTERNS)
    return torch.bincount(index.reshape(-1), minlength=2 * groups * _PATTERNS).reshape(groups, 2, _PATTERNS)


def _cropped(counts: Tensor) -> Tensor:
    kept = counts[..., _FIRST : _FIRST + HALF].clone()
    kept[..., 0] += counts[..., :_FIRST].sum(dim=-1)
    kept[..., -1] += counts[..., _FIRST + HALF :].sum(dim=-1)
    return kept.flip(1).reshape(len(counts), BINS)


def bin_edges(device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Lower and upper magnitude of each bin with the sign of its half, both (BINS,) float32; the first starts at 0."""
    pattern = (torch.arange(HALF + 1, device=device, dtype=torch.int32) + _FIRST) << _SHIFT
    edges = pattern.view(torch.float32)
    edges[0] = 0.0
    near, far = edges[:-1], edges[1:]
    return torch.cat([near, -near]), torch.cat([far, -far])
