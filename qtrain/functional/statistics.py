"""Statistics of tensors that merge exactly: whole numbers in bins that are fixed before any data is seen.

The bins are those of the float format itself: sign, exponent and the first bits of the mantissa, five unless told
otherwise. They cover 2^-32 to 2^32 with a relative width of 1/32, need no range beforehand, and two histograms merge by
integer addition, so that what two ranks saw equals what one rank would have seen. Sums are whole numbers too.
"""

import torch
from torch import Tensor

MANTISSA_BITS = 5
FINE_MANTISSA_BITS = 8
"""Mantissa bits for observers that need finer bins, such as percentiles: a relative width of 1/256."""
EXPONENTS = 64
HALF = EXPONENTS << MANTISSA_BITS
BINS = 2 * HALF
_FIRST = 127 - EXPONENTS // 2
_ROWS = 256 << MANTISSA_BITS

_BANDS = 32
"""Bands of eight exponents each, in which magnitudes are summed."""
_CHUNK = 1 << 22
"""Most elements that are summed at once: each is at most 2^31 in its band, and float64 holds their sum exactly."""


def float_histogram(x: Tensor, mantissa_bits: int = MANTISSA_BITS) -> Tensor:
    """Counts of ``x`` (G, n) in the float bins: (G, 2 half) int64, ``half = 64 << mantissa_bits``.

    Bins ``[0, half)`` are the magnitudes of non-negative values in rising order, ``[half, 2 half)`` those of negative
    ones. Magnitudes below 2^-32, zero among them, fall into the first bin of their half, those above 2^32 into the
    last.
    """
    # Counting every exponent first and cropping the counts costs three passes over the data instead of eight.
    rows = x.detach().float().split(max(_ROWS >> mantissa_bits, 1))
    return torch.cat([_cropped(_pattern_counts(part, mantissa_bits), mantissa_bits) for part in rows])


def _pattern_counts(x: Tensor, mantissa_bits: int) -> Tensor:
    """Counts by leading bits: (G, 2, patterns), negative values first, each half in rising magnitude."""
    groups, patterns = x.shape[0], 256 << mantissa_bits
    index = (x.contiguous().view(torch.int32) >> (23 - mantissa_bits)) + patterns
    if groups > 1:
        index += torch.arange(groups, device=x.device, dtype=torch.int32).unsqueeze(1) * (2 * patterns)
    return torch.bincount(index.reshape(-1), minlength=2 * groups * patterns).reshape(groups, 2, patterns)


def _cropped(counts: Tensor, mantissa_bits: int) -> Tensor:
    first, half = _FIRST << mantissa_bits, EXPONENTS << mantissa_bits
    kept = counts[..., first : first + half].clone()
    kept[..., 0] += counts[..., :first].sum(dim=-1)
    kept[..., -1] += counts[..., first + half :].sum(dim=-1)
    return kept.flip(1).reshape(len(counts), 2 * half)


def bin_edges(device: torch.device | None = None, mantissa_bits: int = MANTISSA_BITS) -> tuple[Tensor, Tensor]:
    """Lower and upper magnitude of each bin with the sign of its half, both (bins,) float32; the first starts at 0."""
    half = EXPONENTS << mantissa_bits
    pattern = torch.arange(half + 1, device=device, dtype=torch.int32) + (_FIRST << mantissa_bits)
    edges = (pattern << (23 - mantissa_bits)).view(torch.float32)
    edges[0] = 0.0
    near, far = edges[:-1], edges[1:]
    return torch.cat([near, -near]), torch.cat([far, -far])


def magnitude_sums(x: Tensor) -> Tensor:
    """The sum of ``|x|`` (G, n), finite, as whole numbers: (G, 32) int64; sums of parts add up exactly.

    Column ``b`` holds, in units of ``2^(8 b - 150)``, what has an exponent from ``8 b`` to ``8 b + 7``. Floating-point
    sums would depend on their order in the last place. See :func:`total_magnitude`.
    """
    sums = torch.zeros(x.shape[0], _BANDS, dtype=torch.int64, device=x.device)
    for part in x.detach().float().split(_CHUNK, dim=1):
        sums += _band_sums(part)
    return sums


def _band_sums(x: Tensor) -> Tensor:
    groups = x.shape[0]
    pattern = x.abs().contiguous().view(torch.int32).to(torch.int64)
    exponent = pattern >> 23
    # A subnormal number has no leading one; its exponent is that of the smallest normal numbers.
    mantissa = (pattern & 0x7FFFFF) + ((exponent > 0).to(torch.int64) << 23)
    exponent = exponent.clamp(min=1)
    units = mantissa << (exponent & 7)
    band = (exponent >> 3) + torch.arange(groups, device=x.device).unsqueeze(1) * _BANDS
    sums = torch.bincount(band.reshape(-1), units.reshape(-1).double(), minlength=groups * _BANDS)
    return sums.to(torch.int64).reshape(groups, _BANDS)


def total_magnitude(sums: Tensor) -> Tensor:
    """What :func:`magnitude_sums` (G, 32) add up to: (G,) float64."""
    units = torch.tensor([2.0 ** (8 * band - 150) for band in range(_BANDS)], dtype=torch.float64, device=sums.device)
    return (sums.double() * units).sum(dim=1)
