"""Two computations of the same codes beside each other: how many differ, by how much, and why."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

TIE = 1e-3
"""Steps from a rounding boundary within which floating point decides by chance: its rounding errors in a sum of some
hundred products, in steps of a code."""

CAUSES = {
    "ties": "ties at a half",
    "biased": "by biases in 32 bits",
    "fused": "by operations that the runtime fuses",
    "saturated": "by sums that saturate in 16 bits",
    "unexplained": "for no known reason",
}
"""Cause of a differing code -> how it is said behind a number; the first that holds is the code's."""

TIES = ("ties", "biased")
"""Causes that lie in the file or in its rounding, and so may change a prediction."""


@dataclass(frozen=True)
class Difference:
    """Of one layer's input over all images: ``differing`` of ``elements`` codes, by at most ``steps``.

    ``ties`` are those that lay within :data:`TIE` of a rounding boundary, and ``biased`` those that the file's own
    biases explain, rounded to 32 bits as they are: integers computed from the file give the same code. ``fused`` are
    those that the runtime gives as the student does when it fuses no operations, and ``saturated`` those that it gives
    so when its sums have 32 bits.
    """

    layer: str
    elements: int = 0
    differing: int = 0
    steps: int = 0
    ties: int = 0
    biased: int = 0
    fused: int = 0
    saturated: int = 0

    @property
    def unexplained(self) -> int:
        return self.differing - self.ties - self.biased - self.fused - self.saturated

    @property
    def cause(self) -> str:
        """Why codes differ, in words; empty where none does."""
        return ", ".join(f"{number} {words}" for name, words in CAUSES.items() if (number := getattr(self, name)))

    def __add__(self, other: "Difference") -> "Difference":
        """Both together, of the same layer."""
        assert self.layer == other.layer
        return Difference(
            self.layer,
            self.elements + other.elements,
            self.differing + other.differing,
            max(self.steps, other.steps),
            self.ties + other.ties,
            self.biased + other.biased,
            self.fused + other.fused,
            self.saturated + other.saturated,
        )


@dataclass(frozen=True)
class Rounded:
    """Codes of one layer's input, int64, and the distances of what was rounded to the nearest boundary, in steps."""

    codes: Tensor
    gaps: Tensor


def gap(steps: Tensor) -> Tensor:
    """How far each of ``steps``, numbers in units of a code, is from the next half, where rounding turns."""
    return (steps - steps.floor() - 0.5).abs()


def causes(
    expected: Rounded, found: Tensor, from_file: Rounded | None = None, without: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Where ``found`` codes differ from ``expected`` ones, by the name of the cause; each code has one.

    ``from_file`` is what integers give with the file's own constants. ``without`` are the codes that the same
    computation gives without what its name in :data:`CAUSES` stands for.
    """
    left = found != expected.codes
    masks = {"ties": left & (expected.gaps <= TIE)}
    left = left & ~masks["ties"]
    if from_file is not None:
        masks["biased"] = left & ((found == from_file.codes) | (from_file.gaps <= TIE))
        left = left & ~masks["biased"]
    for name, codes in (without or {}).items():
        masks[name] = left & (found != codes)
        left = left & ~masks[name]
    return masks | {"unexplained": left}


def counted(layer: str, expected: Rounded, found: Tensor, masks: Mapping[str, Tensor]) -> Difference:
    """``found`` codes beside ``expected`` ones, with the :func:`causes` of what differs."""
    away = (found - expected.codes).abs()
    counts = {name: int(mask.sum()) for name, mask in masks.items()}
    known = {name: number for name, number in counts.items() if name != "unexplained"}
    steps = int(away.max()) if away.numel() else 0
    return Difference(layer, away.numel(), sum(counts.values()), steps, **known)


def by_image(mask: Tensor, images: int) -> Tensor:
    """How many elements of ``mask`` are true in each of so many ``images``, (images,)."""
    if mask.ndim == 0 or mask.shape[0] % images:  # its first axis is not that of the images
        return mask.sum().expand(images)
    return mask.reshape(images, -1).sum(dim=1)
