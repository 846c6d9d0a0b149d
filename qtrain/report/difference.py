"""Differences of accuracies and their standard errors: the one rule for tables, pages and docs.

A difference is a claim only where it is at least :data:`CLAIMED` standard errors. Tables show the error, and mark what
is less.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TypeVar, final

import numpy as np
from numpy.typing import NDArray

from qtrain.utils.bit_text import from_text

Seed = TypeVar("Seed", bound=Hashable)

CLAIMED = 2.0
"""So many standard errors make a difference a claim."""

UNCERTAIN = (
    "In brackets: the standard error of a difference, from the test images and from the spread over seeds, which are "
    "paired where both sides have the same. ~: less than two standard errors, so it may be chance."
)


@final
@dataclass(frozen=True)
class Accuracy:
    """``top1`` in percent, and ``right``: which test images it counts, as the text of :mod:`qtrain.utils.bit_text`;
    empty where the run has not kept it."""

    top1: float
    right: str = ""


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
        """Whether the difference is no claim: too small, of unknown error, or none at all."""
        return self.points == 0 or not abs(self.points) >= CLAIMED * self.error

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


def difference(ours: Mapping[Seed, Accuracy], theirs: Mapping[Seed, Accuracy], *, images: int | None) -> Difference:
    """The mean accuracy of ``ours`` less that of ``theirs``, by seed, on the same ``images``.

    With the same seeds on both sides, the differences d are taken seed by seed, and the seeds' part of the error is
    ``s(d) / sqrt(n)``. Otherwise it is ``sqrt(s1^2 / n1 + s2^2 / n2)``, where a single seed has the spread of the other
    side. Where both sides have a single seed, the spread is not known and left out.

    Where both sides say which images are right, the error is that of pairs: images and seeds are two random effects
    that cross (:func:`_crossed_error`). Otherwise test images add ``p (1 - p) / N + q (1 - q) / N`` to the variance,
    for the two accuracies p and q on N images. That takes the two as independent, and is too large, since they share
    their images. Without the number of images the error is not known: seeds alone would make a difference look far too
    certain.
    """
    if not ours or not theirs:
        return UNKNOWN
    one, other = (fmean(found.top1 for found in side.values()) for side in (ours, theirs))
    paired = ours.keys() == theirs.keys()
    if paired:
        sides = [[ours[seed].top1 - theirs[seed].top1 for seed in ours]]
    else:
        sides = [[found.top1 for found in side.values()] for side in (ours, theirs)]
    of_seeds = _over_seeds([stdev(s) ** 2 if len(s) > 1 else None for s in sides], [len(s) for s in sides])
    right = _right(ours, theirs, paired=paired)
    if right is not None:
        error = _crossed_error(right)
    elif images:
        error = math.sqrt(of_seeds + sum(share * (100 - share) / images for share in (one, other)))
    else:
        error = math.nan
    return Difference(one - other, error, math.sqrt(of_seeds) or math.nan, len(ours) if paired else 0)


def _over_seeds(variances: Sequence[float | None], seeds: Sequence[int]) -> float:
    """The sum over the sides of variance / seeds; one of ``None`` counts as the other's. 0 where none is known."""
    known = [variance for variance in variances if variance is not None]
    return sum((known[0] if v is None else v) / n for v, n in zip(variances, seeds, strict=True)) if known else 0.0


def _right(
    ours: Mapping[Seed, Accuracy], theirs: Mapping[Seed, Accuracy], *, paired: bool
) -> list[NDArray[np.float64]] | None:
    """By seed and image (S, N), in percent: our 100 or 0 less theirs, or where seeds are not paired, ours, and theirs
    negative. ``None`` where a run has not kept it, or they are not of the same number of images."""
    texts = [[side[seed].right for seed in (ours if paired else side)] for side in (ours, theirs)]
    if not all(text for side in texts for text in side):
        return None
    kept = [[100.0 * from_text(text) for text in side] for side in texts]
    if len({len(one) for side in kept for one in side}) > 1:
        return None
    first, second = (np.stack(side) for side in kept)
    return [first - second] if paired else [first, -second]


def _crossed_error(sides: Sequence[NDArray[np.float64]]) -> float:
    """The standard error of the sum of the means of ``sides`` (S, N), where S seeds and N images are random and cross.

    The images' part of the variance is that of the sum over the sides of the mean over seeds, over N: for a single
    seed that is McNemar's. It holds the part of chance that is each seed's and each image's own. The seeds' part is a
    variance component, ``max(0, (MS_seeds - MS_residual) / N)`` over S, of each side. (Cornfield and Tukey 1956,
    "Average values of mean squares in factorials", the two-way layout without repetition.)
    """
    by_image = sum(side.mean(axis=0) for side in sides)
    components: list[float | None] = []
    for side in sides:
        seeds, images = side.shape
        residual = side - side.mean(axis=1, keepdims=True) - side.mean(axis=0) + side.mean()
        if seeds > 1:
            ms_residual = (residual**2).sum() / ((seeds - 1) * (images - 1))
            components.append(max(0.0, float(side.mean(axis=1).var(ddof=1) - ms_residual / images)))
        else:
            components.append(None)
    of_images = float(np.var(by_image, ddof=1)) / sides[0].shape[1]
    return math.sqrt(of_images + _over_seeds(components, [len(side) for side in sides]))
