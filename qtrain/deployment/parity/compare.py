"""Two computations of the same codes beside each other: how many differ, by how much, and why."""

from dataclasses import dataclass

import torch
from torch import Tensor

TIE = 1e-3
"""Steps from a rounding boundary within which floating point decides by chance: its rounding errors in a sum of some
hundred products, in steps of a code."""


@dataclass(frozen=True)
class Difference:
    """Of one layer's input over all images: ``differing`` of ``elements`` codes, by at most ``steps``.

    ``ties`` are those that lay within :data:`TIE` of a rounding boundary, and ``biased`` those that the file's own
    biases explain, rounded to 32 bits as they are: integers computed from the file give the same code.
    """

    layer: str
    elements: int = 0
    differing: int = 0
    steps: int = 0
    ties: int = 0
    biased: int = 0

    @property
    def unexplained(self) -> int:
        return self.differing - self.ties - self.biased

    @property
    def cause(self) -> str:
        """Why codes differ, in words; empty where none does."""
        causes = []
        if self.ties:
            causes.append(f"{self.ties} ties at a half")
        if self.biased:
            causes.append(f"{self.biased} by biases in 32 bits")
        if self.unexplained:
            causes.append(f"{self.unexplained} for no known reason")
        return ", ".join(causes)

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
        )


@dataclass(frozen=True)
class Rounded:
    """Codes of one layer's input, int64, and the distances of what was rounded to the nearest boundary, in steps."""

    codes: Tensor
    gaps: Tensor


def gap(steps: Tensor) -> Tensor:
    """How far each of ``steps``, numbers in units of a code, is from the next half, where rounding turns."""
    return (steps - steps.floor() - 0.5).abs()


def difference(layer: str, expected: Rounded, found: Tensor, from_file: Rounded | None = None) -> Difference:
    """``found`` codes beside ``expected`` ones; ``from_file`` is what integers give with the file's own constants."""
    away = (found - expected.codes).abs()
    differs = away > 0
    tie = differs & (expected.gaps <= TIE)
    biased = torch.zeros_like(tie)
    if from_file is not None:
        biased = differs & ~tie & ((found == from_file.codes) | (from_file.gaps <= TIE))
    return Difference(
        layer,
        away.numel(),
        int(differs.sum()),
        int(away.max()) if away.numel() else 0,
        int(tie.sum()),
        int(biased.sum()),
    )
