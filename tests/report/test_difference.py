"""Differences and their standard errors, against values worked out by hand."""

import math

import numpy as np
import pytest

from qtrain.report.difference import UNKNOWN, Accuracy, Difference, difference
from qtrain.utils.bit_text import to_text


def side(*accuracies: float, first: int = 0) -> dict[int, Accuracy]:
    """By seed, from ``first`` on, of runs that did not keep which images they had right."""
    return {seed: Accuracy(top1) for seed, top1 in enumerate(accuracies, start=first)}


def kept(*right: str, first: int = 0) -> dict[int, Accuracy]:
    """By seed, of runs that had the images right for which there is a 1."""
    bits = [np.array([letter == "1" for letter in one]) for one in right]
    return {seed: Accuracy(100 * float(b.mean()), to_text(b)) for seed, b in enumerate(bits, start=first)}


OURS = side(92.0, 95.0, 98.0)


def test_shared_seeds_are_paired() -> None:
    """Differences 2, 4, 6: deviation 2, over the root of 3."""
    found = difference(OURS, {2: Accuracy(92.0), 1: Accuracy(91.0), 0: Accuracy(90.0)}, images=10**9)
    assert (found.points, found.paired) == (4.0, 3)
    assert found.seed_error == pytest.approx(1.154701, abs=1e-6)
    assert found.error == pytest.approx(1.154701, abs=1e-4)
    assert not found.uncertain


def test_other_seeds_are_not_paired() -> None:
    """Deviations 3 and 1 over 3 seeds each: sqrt(9 / 3 + 1 / 3)."""
    found = difference(OURS, side(90.0, 91.0, 92.0, first=3), images=None)
    assert (found.points, found.paired) == (4.0, 0)
    assert found.seed_error == pytest.approx(1.825742, abs=1e-6)


def test_a_single_seed_against_several_has_their_spread() -> None:
    """The deviation 3 of the three: 3 sqrt(1 + 1 / 3) = 3.464102."""
    for found in (difference(side(90.0), OURS, images=None), difference(OURS, side(90.0, first=7), images=None)):
        assert abs(found.points) == 5.0 and found.seed_error == pytest.approx(3.464102, abs=1e-6)


def test_test_images_add_the_spread_of_both_shares() -> None:
    """95 and 91 % of 100 images: (95 x 5 + 91 x 9) / 100 = 12.94, and 4 / 3 by paired seeds."""
    found = difference(OURS, side(90.0, 91.0, 92.0), images=100)
    assert found.error == pytest.approx(3.778007, abs=1e-6)
    assert found.seed_error == pytest.approx(1.154701, abs=1e-6)
    assert found.uncertain and str(found) == "+4.00 (3.78) ~"


def test_a_single_seed_has_the_error_of_its_images_alone() -> None:
    """357 and 358 of 360 images: sqrt(357 x 3 + 358 x 2) / 360^1.5 is 0.00618883."""
    found = difference(side(100 * 357 / 360), side(100 * 358 / 360), images=360)
    assert found.error == pytest.approx(0.618883, abs=1e-6) and math.isnan(found.seed_error)
    assert str(found) == "-0.28 (0.62) ~"


def test_no_difference_is_no_claim_although_its_error_is_none() -> None:
    """Two models that are right on the same images."""
    same = {0: Accuracy(50.0, to_text(np.arange(8) < 4))}
    found = difference(same, same, images=8)
    assert (found.points, found.error) == (0.0, 0.0)
    assert found.uncertain and str(found) == "+0.00 (0.00) ~"


@pytest.mark.parametrize("points, text", [(1.99, "+1.99 (1.00) ~"), (2.0, "+2.00 (1.00)"), (-2.01, "-2.01 (1.00)")])
def test_two_standard_errors_make_a_claim(points: float, text: str) -> None:
    assert str(Difference(points, 1.0, 0.0, 1)) == text


def test_a_missing_side_has_no_difference() -> None:
    found = difference({}, OURS, images=100)
    assert found is UNKNOWN and math.isnan(found.points) and str(found) == ""


def test_a_difference_of_unknown_error_is_no_claim() -> None:
    found = difference(side(95.0), side(85.0), images=None)
    assert math.isnan(found.error) and found.uncertain and str(found) == "+10.00 (?)"


def test_seeds_alone_do_not_make_an_error() -> None:
    """Their spread is 0.02 points here, of some thousand images each: the images' part would be twenty times that."""
    found = difference(side(91.20, 91.24, 91.22), side(91.71, 91.73, 91.75), images=None)
    assert math.isnan(found.error) and found.seed_error < 0.02 and found.uncertain


def test_one_seed_each_has_the_error_of_mcnemar() -> None:
    """3 images that ours alone has right, 1 that theirs has: (3 + 1 - 2^2 / 10) / (10 x 9) = 0.04."""
    found = difference(kept("1111110000"), kept("0001110001"), images=10)
    assert found.points == pytest.approx(20.0) and found.error == pytest.approx(100 * math.sqrt(0.04))
    assert math.isnan(found.seed_error)


def test_images_that_both_have_right_or_wrong_add_nothing() -> None:
    """The same 20 discordant images among 1,000 and among 10,000 shared ones: the error is of the 20, not of shares."""
    ours, theirs = "1" * 20 + "10" * 490, "0" * 20 + "10" * 490
    found = difference(kept(ours), kept(theirs), images=1000)
    assert found.error == pytest.approx(100 * math.sqrt((20 - 400 / 1000) / (1000 * 999)))
    assert found.error < difference(side(51.0), side(49.0), images=1000).error / 4


def test_seeds_and_images_cross() -> None:
    """Differences by seed 100 x [[1, 0, 0, 1], [1, 0, 0, 0]]: by image 1, 0, 0, 1/2, variance 0.229167 over 4 images is
    0.057292. Seeds: means 1/2 and 1/4, variance 1/32; residuals are 1/8 in size or 3/8: mean square 1/8 over 3 is
    8 (1 or 9) / 64. Less than that of the residual, so seeds add nothing."""
    found = difference(kept("1001", "1000"), kept("0000", "0000"), images=4)
    assert found.error == pytest.approx(100 * math.sqrt(0.2291667 / 4), abs=1e-3)


def test_seeds_that_really_differ_add_their_part() -> None:
    """One seed has 8 of 8 more right, the other none: seed means 1 and 0, no residual; 1/2 over 2 seeds is 1/4."""
    found = difference(kept("11111111", "00000000"), kept("00000000", "00000000"), images=8)
    assert found.points == 50.0 and found.error == pytest.approx(50.0)


def test_error_is_the_spread_of_repeated_experiments() -> None:
    """Images and seeds drawn again and again, of a known model: the mean estimated variance is that of the outcome."""
    draw, found = np.random.default_rng(0), []
    for _ in range(400):
        hard, ours, theirs = draw.normal(size=200), draw.normal(0.3, 0.2, size=(3, 1)), draw.normal(0, 0.2, size=(3, 1))
        right = [draw.normal(size=(3, 200)) + hard + skill > 0 for skill in (ours, theirs)]
        sides = [{s: Accuracy(100 * float(b.mean()), to_text(b)) for s, b in enumerate(bits)} for bits in right]
        found.append(difference(*sides, images=200))
    spread = np.std([one.points for one in found])
    assert np.sqrt(np.mean([one.error**2 for one in found])) == pytest.approx(spread, rel=0.1)


def test_other_seeds_share_their_images() -> None:
    """Six runs, one side always right where the other is: no residual and no seeds, so the images' part alone."""
    found = difference(kept("1110", "1110"), kept("1100", "1100", "1100", first=5), images=4)
    assert found.points == pytest.approx(25.0)
    assert found.error == pytest.approx(100 * math.sqrt(0.25 / 4))


def test_images_of_other_numbers_are_not_compared_one_by_one() -> None:
    found = difference(kept("1110"), kept("11000"), images=4)
    assert found.error == pytest.approx(math.sqrt((75 * 25 + 40 * 60) / 4))
