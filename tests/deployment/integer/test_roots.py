"""Reciprocals and roots without a division, against exact fractions."""

from fractions import Fraction

import torch
from hypothesis import given
from hypothesis import strategies as st

from qtrain.deployment.integer.roots import bit_length, moved, reciprocal, reciprocal_root

positive = st.integers(0, 62).flatmap(lambda bits: st.integers(1, 2**bits))
ACCURACY = Fraction(1, 2**28)


@given(st.lists(st.integers(0, 2**63 - 1), min_size=1))
def test_bits_are_counted_as_python_counts_them(values: list[int]) -> None:
    assert bit_length(torch.tensor(values)).tolist() == [value.bit_length() for value in values]


@given(positive)
def test_a_reciprocal_is_right_to_28_bits(value: int) -> None:
    r, e = (int(part) for part in reciprocal(torch.tensor([value])))
    assert 2**30 - 8 <= r <= 2**31
    assert abs(Fraction(r) / 2 ** (30 + e) * value - 1) <= ACCURACY


@given(positive)
def test_a_reciprocal_root_is_right_to_28_bits(value: int) -> None:
    r, e = (int(part) for part in reciprocal_root(torch.tensor([value])))
    assert 2**30 - 8 <= r <= 2**31
    assert abs((Fraction(r) / 2 ** (30 + e)) ** 2 * value - 1) <= 2 * ACCURACY


@given(st.integers(-(2**40), 2**40), st.integers(-20, 62))
def test_a_shift_rounds_to_the_nearest(value: int, right: int) -> None:
    found = int(moved(torch.tensor([value]), torch.tensor([right])))
    assert abs(found - Fraction(value) / Fraction(2) ** right) <= Fraction(1, 2)
