"""Differences of accuracies and their standard errors: the one rule for tables, pages and docs.

A difference is a claim only where it is at least :data:`CLAIMED` standard errors. Tables show the error, and mark what
is less.
"""

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TypeVar, final

Seed = TypeVar("Seed", bound=Hashable)

CLAIMED = 2.0
"""So many standard errors make a difference a claim."""

UNCERTAIN = (
    "In brackets: the standard error of a difference, from the number of test images and from the spread over seeds, "
    "which are paired where both sides have the same. ~: less than two standard errors, so it may be chance."
)


@final
@dataclass(frozen=True)
class Difference:
    """``points`` is the mean of one side less that of the other, ``error`` its standard error, both in points.

    ``error`` is NaN where nothing is known of it. ``seed_error`` is the part that comes from seeds, NaN for a single
    seed. ``paired`` counts the seeds that both sides share, 0 where they have different ones.
    """

    points: float
    error: float
    seed_error: float
    paired: int

    @property
    def uncertain(self) -> bool:
        """Whether the difference is no claim: too small, or of unknown error."""
        return not abs(self.points) >= CLAIMED * self.error

    def __str__(self) -> str:
        """``-0.28 (0.64) ~``: points, standard error, and the mark of what is no claim; ``-0.28 (?)`` of unknown error.

        Empty where a side is missing.
        """
        if math.isnan(self.points):
            return ""
        if math.isnan(self.error):
            return f"{self.points:+.2f} (?)"
        return f"{self.points:+.2f} ({self.error:.2f})" + (" ~" if self.uncertain else "")


UNKNOWN = Difference(math.nan, math.nan, math.nan, 0)
"""Where a side is missing."""


def difference(ours: Mapping[Seed, float], theirs: Mapping[Seed, float], *, images: int | None) -> Difference:
    """The mean accuracy of ``ours`` less that of ``theirs``, each in percent by seed, on the same ``images``.

    With the same seeds on both sides, the differences d are taken seed by seed, and the seeds' part of the error is
    ``s(d) / sqrt(n)``. Otherwise it is ``sqrt(s1^2 / n1 + s2^2 / n2)``, where a single seed has the spread of the other
    side. Test images add ``p (1 - p) / N + q (1 - q) / N`` to the variance, for the two accuracies p and q on N images.
    That takes the two as independent and is rather too large, since they share their images. What is not known is left
    out: the spread where both have a single seed, and images that are ``None``.
    """
    if not ours or not theirs:
        return UNKNOWN
    one, other = fmean(ours.values()), fmean(theirs.values())
    paired = ours.keys() == theirs.keys()
    sides = [[ours[seed] - theirs[seed] for seed in ours]] if paired else [list(ours.values()), list(theirs.values())]
    known = [stdev(values) ** 2 for values in sides if len(values) > 1]
    spreads = [(stdev(v) ** 2 if len(v) > 1 else known[0]) / len(v) for v in sides if known]
    shares = [share * (100 - share) / images for share in (one, other)] if images else []
    seed_error, error = (math.sqrt(sum(parts)) if parts else math.nan for parts in (spreads, spreads + shares))
    return Difference(one - other, error, seed_error, len(ours) if paired else 0)
