"""The histogram in the bins of the float format: every value in its bin, and merging is addition."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from qtrain.functional.statistics import BINS, HALF, MANTISSA_BITS, bin_edges, float_histogram


def bin_of(value: float) -> int:
    """The bin by arithmetic on the number, not on its bits."""
    half = HALF if value < 0 or math.copysign(1, value) < 0 else 0
    if abs(value) < 2.0**-32:
        return half
    mantissa, exponent = math.frexp(abs(value))  # |value| = mantissa * 2^exponent, mantissa in [1/2, 1)
    if exponent - 1 >= 32:
        return half + HALF - 1
    return half + ((exponent - 1 + 32) << MANTISSA_BITS) + int((mantissa * 2 - 1) * 2**MANTISSA_BITS)


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_each_value_falls_into_its_bin(value: float) -> None:
    counts = float_histogram(torch.tensor([[value]]))
    assert counts.shape == (1, BINS)
    assert counts.sum() == 1
    assert counts[0].nonzero().item() == bin_of(value)


@given(st.floats(2.0**-31, 2.0**31, width=32), st.sampled_from([-1.0, 1.0]))
def test_the_edges_enclose_the_value_closely(magnitude: float, sign: float) -> None:
    near, far = (edge[bin_of(sign * magnitude)].item() for edge in bin_edges())
    assert near * sign <= magnitude < far * sign
    assert (far - near) * sign <= magnitude / 32


def test_small_and_great_values_have_their_ends() -> None:
    counts = float_histogram(torch.tensor([[0.0, 1e-20, -1e-20, -0.0, 1e30, -1e30]]))[0]
    assert counts[[0, HALF, HALF - 1, BINS - 1]].tolist() == [2, 2, 1, 1]
    near, far = bin_edges()
    assert near[[0, HALF]].tolist() == [0.0, 0.0]
    assert far[[HALF - 1, BINS - 1]].tolist() == [2.0**32, -(2.0**32)]


def test_histograms_of_parts_add_up() -> None:
    x = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(float_histogram(x[:, :400]) + float_histogram(x[:, 400:]), float_histogram(x))


def test_rows_are_counted_apart_whatever_their_number() -> None:
    x = torch.randn(300, 7, generator=torch.Generator().manual_seed(0))  # more rows than one pass takes
    counts = float_histogram(x)
    assert counts.sum(dim=1).tolist() == [7] * 300
    for row in (0, 255, 256, 299):
        assert torch.equal(counts[row : row + 1], float_histogram(x[row : row + 1]))


def test_half_precision_is_counted_as_its_value() -> None:
    x = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(float_histogram(x), float_histogram(x.float()))
