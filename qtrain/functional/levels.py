"""Levels that a method fixes: powers of two, and sums of powers of two; rounding to the nearest of them.

Source: Li, Dong, Wang 2020, "Additive Powers-of-Two Quantization" (APoT, arXiv 1909.13144).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from qtrain.functional.indicator import above
from qtrain.functional.materialized import materialized
from qtrain.functional.powers import nearest_power
from qtrain.functional.ste import clamp_to, straight_through

Nearest = Callable[[Tensor, Tensor], Tensor]
"""(values, levels (K,)) -> the level nearest to each value, the lower one at a tie; float32, shape of the values."""

CELLS = 4096
"""Cells to a unit in :func:`looked_up`."""

FEW_BOUNDARIES = 32
"""Up to so many are compared with one by one in compiled code."""


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
    """How many of ``boundaries`` (B,), ascending, lie below each of ``t``: int64, shape and memory layout of ``t``.

    Compiled code searches one value at a time, on a CPU. So there the few are compared with one by one, and of many the
    place is found by halves, both on whole vectors of values.
    """
    if not torch.compiler.is_compiling():
        return torch.empty_like(t, dtype=torch.int64).copy_(torch.bucketize(t.contiguous(), boundaries))
    if len(boundaries) <= FEW_BOUNDARIES:
        count = torch.zeros_like(t, dtype=torch.float32)
        for boundary in boundaries.unbind():
            count = count + above(t, boundary)
        return count.to(torch.int64)
    step = 1 << (len(boundaries).bit_length() - 1)
    padded = torch.cat([boundaries, boundaries.new_full((2 * step - 1 - len(boundaries),), torch.inf)])
    place = torch.zeros_like(t, dtype=torch.int64)
    while step:
        place = place + torch.where(t > padded[place + (step - 1)], step, 0)
        step //= 2
    return place


def nearest_level(t: Tensor, levels: Tensor) -> Tensor:
    """Index of the level nearest to ``t`` in the linear domain, the lower one at a tie: int64, shape of ``t``.

    ``levels`` (K,) ascend; the last may be repeated, which changes nothing for ``t`` not above it.
    """
    return bucket(t, midpoints_of(levels))


def midpoints_of(levels: Tensor) -> Tensor:
    """Halfway between neighbors of ``levels`` (K,): (K - 1,)."""
    return (levels[:-1] + levels[1:]) / 2


def cells_suffice(levels: Tensor) -> bool:
    """Whether no cell of :func:`looked_up` has two midpoints of ``levels`` (K,), in [-1, 1], and a byte counts them."""
    gaps = midpoints_of(levels).diff()
    return len(levels) <= 256 and bool((gaps[gaps > 0] > 1 / CELLS).all())


def searched(t: Tensor, levels: Tensor) -> Tensor:
    """``levels[nearest_level(t, levels)]``."""
    return levels[nearest_level(t, levels)]


def looked_up(t: Tensor, levels: Tensor) -> Tensor:
    """:func:`searched` for ``t`` and ``levels`` (K,) in [-1, 1], by a table, which is faster: float32.

    The table has a row for each cell ``[c / CELLS, (c + 1) / CELLS)``: the first midpoint from there on, and how many
    lie below it. :func:`cells_suffice` says for which levels that is enough. Scaling by a power of two is exact, so
    each value is looked up in its own cell.
    """
    middle = midpoints_of(levels)
    counts = torch.zeros(2 * CELLS + 1, dtype=torch.int32, device=t.device)
    counts = counts.index_add(0, _cell(middle), torch.ones_like(middle, dtype=torch.int32))
    below = counts.cumsum(0) - counts
    following = torch.cat([middle, torch.full_like(middle[:1], torch.inf)])[below]
    table = torch.stack([following, below.float()], dim=1)  # which compiled code computes once, not for each value
    cell = _cell(t.detach())
    index = table[cell, 1] + above(t, table[cell, 0])
    # A byte each, which compiled code then keeps for the backward instead of looking it up again.
    return levels[materialized(index.to(torch.uint8)).to(torch.int32)]


def _cell(t: Tensor) -> Tensor:
    return ((t * CELLS).floor().to(torch.int32) + CELLS).clamp(0, 2 * CELLS)


def nearest_of_powers(t: Tensor, levels: Tensor) -> Tensor:
    """:func:`searched` for ``levels`` (K,) that are zero and powers of two up to 1, by bit patterns: faster."""
    return nearest_power(t, levels.masked_fill(levels <= 0, 1.0).amin())


def fake_quantize_to_levels(x: Tensor, scale: Tensor, levels: Tensor, nearest: Nearest = searched) -> Tensor:
    """``x^ = s nearest(clamp(x / s, l_1, l_K))``, float32, for levels ``l`` (K,) and ``scale`` that broadcasts.

    The gradient is that of APoT's reparameterized clipping (eq. 8): for ``x`` 1 between the outer levels and 0 beyond;
    for ``scale`` ``nearest(x / s) - x / s`` between them, the outer level beyond, since the projection's own derivative
    is taken as 1. ``nearest`` gives the level nearest to each ``t``.
    """
    t = clamp_to(x / scale, levels[0], levels[-1])
    return straight_through(nearest(t, levels), t) * scale
