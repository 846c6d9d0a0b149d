"""The histogram in the bins of the float format: every value in its bin, and merging is addition."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtrain.functional.statistics import (
    BINS,
    HALF,
    MANTISSA_BITS,
    bin_edges,
    float_histogram,
    magnitude_sums,
    total_magnitude,
)


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


def test_values_outside_the_bins_fall_into_the_end_bins() -> None:
    counts = float_histogram(torch.tensor([[0.0, 1e-20, -1e-20, -0.0, 1e30, -1e30]]))[0]
    assert counts[[0, HALF, HALF - 1, BINS - 1]].tolist() == [2, 2, 1, 1]
    near, far = bin_edges()
    assert near[[0, HALF]].tolist() == [0.0, 0.0]
    assert far[[HALF - 1, BINS - 1]].tolist() == [2.0**32, -(2.0**32)]


def test_histograms_of_parts_add_up() -> None:
    x = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(float_histogram(x[:, :400]) + float_histogram(x[:, 400:]), float_histogram(x))


def test_rows_are_counted_separately() -> None:
    x = torch.randn(300, 7, generator=torch.Generator().manual_seed(0))  # more rows than one pass takes
    counts = float_histogram(x)
    assert counts.sum(dim=1).tolist() == [7] * 300
    for row in (0, 255, 256, 299):
        assert torch.equal(counts[row : row + 1], float_histogram(x[row : row + 1]))


def test_half_precision_is_counted_as_its_value() -> None:
    x = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(float_histogram(x), float_histogram(x.float()))


def test_finer_bins_subdivide_the_default_bins() -> None:
    x = torch.randn(300, 40, generator=torch.Generator().manual_seed(0))
    finer = float_histogram(x, MANTISSA_BITS + 3)
    assert torch.equal(finer.reshape(300, BINS, 8).sum(dim=2), float_histogram(x))
    near, far = bin_edges(mantissa_bits=MANTISSA_BITS + 3)
    assert torch.equal(near.reshape(BINS, 8)[:, 0], bin_edges()[0])
    assert torch.equal(far.reshape(BINS, 8)[:, -1], bin_edges()[1])
    value = torch.tensor([[1.37]])
    place = float_histogram(value, 11)[0].argmax()
    near, far = bin_edges(mantissa_bits=11)
    assert near[place] <= 1.37 < far[place]
    assert far[place] - near[place] == 2.0**-11


magnitudes = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=30)


@given(magnitudes, st.integers(0, 30))
def test_magnitudes_are_summed_without_rounding(values: list[float], cut: int) -> None:
    """Against exact fractions, subnormal numbers included; and parts add up to the whole."""
    x = torch.tensor([values, values[::-1]])
    sums = magnitude_sums(x)
    exact = sum((Fraction(abs(value)) for value in values), Fraction(0))
    held = sum(Fraction(int(column)) * Fraction(2) ** (8 * band - 150) for band, column in enumerate(sums[0]))
    assert held == exact
    assert torch.equal(sums[0], sums[1])
    assert torch.equal(magnitude_sums(x[:, :cut]) + magnitude_sums(x[:, cut:]), sums)
    if exact < 2**1000:
        assert total_magnitude(sums)[0].item() == pytest.approx(float(exact), rel=1e-15)


def test_a_long_row_is_summed_as_its_parts() -> None:
    x = torch.full((1, (1 << 22) + 5), 0.3)
    assert int(magnitude_sums(x).sum()) == ((1 << 22) + 5) * int(magnitude_sums(x[:, :1]).sum())
