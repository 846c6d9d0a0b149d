"""Differences and their standard errors, against values worked out by hand."""

import math

import pytest

from qtrain.report.difference import UNKNOWN, Difference, difference

OURS = {0: 92.0, 1: 95.0, 2: 98.0}


def test_shared_seeds_are_paired() -> None:
    """Differences 2, 4, 6: deviation 2, over the root of 3."""
    found = difference(OURS, {2: 92.0, 1: 91.0, 0: 90.0}, images=None)
    assert (found.points, found.paired) == (4.0, 3)
    assert found.error == found.seed_error == pytest.approx(1.154701, abs=1e-6)
    assert not found.uncertain


def test_other_seeds_are_not_paired() -> None:
    """Deviations 3 and 1 over 3 seeds each: sqrt(9 / 3 + 1 / 3)."""
    found = difference(OURS, {3: 90.0, 4: 91.0, 5: 92.0}, images=None)
    assert (found.points, found.paired) == (4.0, 0)
    assert found.error == pytest.approx(1.825742, abs=1e-6)


def test_a_single_seed_against_several_has_their_spread() -> None:
    """The deviation 3 of the three: 3 sqrt(1 + 1 / 3) = 3.464102."""
    for found in (difference({0: 90.0}, OURS, images=None), difference(OURS, {7: 90.0}, images=None)):
        assert abs(found.points) == 5.0 and found.error == pytest.approx(3.464102, abs=1e-6)


def test_test_images_add_the_spread_of_both_shares() -> None:
    """95 and 91 % of 100 images: (95 x 5 + 91 x 9) / 100 = 12.94, and 4 / 3 by paired seeds."""
    found = difference(OURS, {0: 90.0, 1: 91.0, 2: 92.0}, images=100)
    assert found.error == pytest.approx(3.778007, abs=1e-6)
    assert found.seed_error == pytest.approx(1.154701, abs=1e-6)
    assert found.uncertain and str(found) == "+4.00 (3.78) ~"


def test_a_single_seed_has_the_error_of_its_images_alone() -> None:
    """357 and 358 of 360 images: sqrt(357 x 3 + 358 x 2) / 360^1.5 is 0.00618883."""
    found = difference({0: 100 * 357 / 360}, {0: 100 * 358 / 360}, images=360)
    assert found.error == pytest.approx(0.618883, abs=1e-6) and math.isnan(found.seed_error)
    assert str(found) == "-0.28 (0.62) ~"


@pytest.mark.parametrize("points, text", [(1.99, "+1.99 (1.00) ~"), (2.0, "+2.00 (1.00)"), (-2.01, "-2.01 (1.00)")])
def test_two_standard_errors_make_a_claim(points: float, text: str) -> None:
    assert str(Difference(points, 1.0, 0.0, 1)) == text


def test_a_missing_side_has_no_difference() -> None:
    found = difference({}, OURS, images=100)
    assert found is UNKNOWN and math.isnan(found.points) and str(found) == ""


def test_a_difference_of_unknown_error_is_no_claim() -> None:
    found = difference({0: 95.0}, {0: 85.0}, images=None)
    assert math.isnan(found.error) and found.uncertain and str(found) == "+10.00 (?)"
