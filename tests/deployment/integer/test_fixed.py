"""Numbers in whole units: rounding and rescaling against exact fractions."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtrain.deployment.integer.fixed import Fixed, constant, dyadic, multiplied, rescaled, uniform, unit


def fixed(numbers: list[int], scale: float | list[float], bound: int | None = None) -> Fixed:
    largest = max(map(abs, numbers)) if bound is None else bound
    return Fixed(torch.tensor(numbers), torch.tensor(scale, dtype=torch.float64), largest)


@given(st.integers(-(2**31), 2**31), st.integers(1, 2**20), st.integers(0, 40))
def test_a_factor_that_is_a_whole_number_of_halvings_is_exact(number: int, m: int, shift: int) -> None:
    factor = m / 2**shift
    if abs(number) * factor > 2**60:
        return
    (found,) = multiplied(torch.tensor([number]), torch.tensor([factor], dtype=torch.float64), 2**31).tolist()
    assert found == round(Fraction(number) * Fraction(m, 2**shift))  # of Python: a tie to the even number


@given(st.integers(-(2**24), 2**24), st.floats(1e-12, 1e3))
def test_any_factor_is_right_but_for_its_last_bits(number: int, factor: float) -> None:
    (found,) = multiplied(torch.tensor([number]), torch.tensor([factor], dtype=torch.float64), 2**24).tolist()
    assert abs(found - Fraction(number) * Fraction(factor)) <= Fraction(1, 2) + Fraction(abs(number)) * Fraction(
        factor
    ) * Fraction(1, 2**37)


@given(st.floats(1e-15, 1e6), st.integers(8, 40))
def test_a_dyadic_factor_has_no_more_bits_than_asked_and_is_near(factor: float, bits: int) -> None:
    m, n = (int(part) for part in dyadic(torch.tensor(factor, dtype=torch.float64), bits))
    assert 0 <= m < 2**bits and n <= 62
    assert abs(Fraction(m) / Fraction(2) ** n - Fraction(factor)) <= max(
        Fraction(factor) / 2 ** (bits - 1), Fraction(1, 2**62)
    )


def test_numbers_wider_than_a_word_are_refused() -> None:
    with pytest.raises(OverflowError, match="numbers of 63 bits do not fit 62"):
        fixed([0], 1.0, bound=2**62)
    with pytest.raises(OverflowError, match="do not fit 36"):
        rescaled(fixed([2**30], 1.0), torch.tensor(1e-6, dtype=torch.float64))


def test_scales_of_channels_become_one() -> None:
    x = fixed([100, -200], [0.5, 0.003])
    whole = uniform(x)
    assert whole.scale.numel() == 1
    assert torch.allclose(whole.numbers * whole.scale, x.numbers * x.scale, rtol=1e-8)


def test_the_unit_of_a_sum_holds_it() -> None:
    left, right = fixed([2**20], 0.37), fixed([2**30], 1e-4)
    scale = unit(left, right)
    total = rescaled(left, scale).numbers + rescaled(right, scale).numbers
    assert int(total.abs().max()) < 2**36
    assert float(total[0] * scale) == pytest.approx(2**20 * 0.37 + 2**30 * 1e-4, rel=1e-9)


def test_a_constant_is_the_nearest_multiple() -> None:
    made = constant(torch.tensor([0.26, -0.74, 3.0]), torch.tensor(0.5, dtype=torch.float64))
    assert made.numbers.tolist() == [1, -1, 6]
    assert made.bound == 6
