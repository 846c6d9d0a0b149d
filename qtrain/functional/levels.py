"""Levels that a method fixes: powers of two, and sums of powers of two; rounding to the nearest of them.

Source: Li, Dong, Wang 2020, "Additive Powers-of-Two Quantization" (APoT, arXiv 1909.13144).
"""

import torch
from torch import Tensor

from qtrain.functional.ste import clamp_to, straight_through


def powers_of_two(bits: int) -> list[float]:
    """The ``2^bits`` magnitudes ``0, 2^-(2^bits-2), ..., 1/2, 1`` (eq. 3, as many as ``bits`` bits can name).

    >>> powers_of_two(2)
    [0.0, 0.25, 0.5, 1.0]
    """
    return [0.0, *(2.0**-k for k in reversed(range(2**bits - 1)))]


def sums_of_powers(bits: int) -> list[float]:
    """The ``2^bits`` magnitudes of APoT for base width k = 2, ascending, divided by the largest (eq. 5 and 6).

    One power out of each of ``n = bits // 2`` sets ``{0, 2^-i, 2^-(i+n), 2^-(i+2n)}``, added up. An odd width has one
    more set, ``{0, 2^-2n}``, and the sets' last powers make room for it: ``2^-(i+2n+1)``.

    >>> sums_of_powers(3)
    [0.0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0]
    """
    pairs, odd = divmod(bits, 2)
    sets = [[0.0, 2.0**-i, 2.0 ** -(i + pairs), 2.0 ** -(i + 2 * pairs + odd)] for i in range(pairs)]
    sums = [0.0]
    for terms in [*sets, [0.0, 2.0 ** -(2 * pairs)]] if odd else sets:
        sums = [total + term for total in sums for term in terms]
    largest = max(sums)
    return [total / largest for total in sorted(sums)]


def mirrored(magnitudes: list[float]) -> list[float]:
    """``magnitudes``, ascending from zero, with their negatives; zero once."""
    return [*(-m for m in reversed(magnitudes[1:])), *magnitudes]


def bucket(t: Tensor, boundaries: Tensor) -> Tensor:
    """How many of ``boundaries`` (B,), ascending, lie below each of ``t``: int64, shape and memory layout of ``t``."""
    return torch.empty_like(t, dtype=torch.int64).copy_(torch.bucketize(t.contiguous(), boundaries))


def nearest_level(t: Tensor, levels: Tensor) -> Tensor:
    """Index of the level nearest to ``t`` in the linear domain, the lower one at a tie: int64, shape of ``t``.

    ``levels`` (K,) ascend; the last may be repeated, which changes nothing for ``t`` not above it.
    """
    return bucket(t, (levels[:-1] + levels[1:]) / 2)


def fake_quantize_to_levels(x: Tensor, scale: Tensor, levels: Tensor) -> Tensor:
    """``x^ = s nearest(clamp(x / s, l_1, l_K))``, float32, for levels ``l`` (K,) and ``scale`` that broadcasts.

    The gradient is that of APoT's reparameterized clipping (eq. 8): for ``x`` 1 between the outer levels and 0 beyond;
    for ``scale`` ``nearest(x / s) - x / s`` between them, the outer level beyond, since the projection's own derivative
    is taken as 1.
    """
    t = clamp_to(x / scale, levels[0], levels[-1])
    return straight_through(levels[nearest_level(t, levels)], t) * scale
