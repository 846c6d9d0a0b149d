"""What all searches over bits have in common: the uniform bits that they are compared with, and one question."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from qtrain.allocate.problem import Problem
from qtrain.allocate.uniform import Uniform
from qtrain.spec import Allocation, LayerBits


@dataclass(frozen=True, kw_only=True)
class Search(ABC):
    """An allocator that chooses bits for a budget.

    ``weight`` and ``input`` are the uniform bits that budgets in percent refer to, so that ``100%`` asks for a model
    that costs what these cost. ``first`` and ``last`` are the bits of the layers at the two ends, which keep them;
    ``None`` lets the search choose these as well. Raises ``ValueError`` for bits that do not exist.
    """

    needs_scores: ClassVar[bool] = True
    """Whether the problem must have scores."""

    weight: int = 4
    input: int = 4
    first: LayerBits | None = None
    last: LayerBits | None = None

    def __post_init__(self) -> None:
        _ = self.reference  # which holds the bits against their rule

    @property
    def reference(self) -> Uniform:
        """The uniform bits that this search is compared with."""
        return Uniform(weight=self.weight, input=self.input, first=self.first, last=self.last)

    def __call__(self, layers: Sequence[str]) -> Allocation:
        """The uniform bits, for a rehearsal: a search needs more than names."""
        return self.reference(layers)

    @abstractmethod
    def search(self, problem: Problem) -> Allocation:
        """Bits for all layers of ``problem``, within its budgets; the same for the same seed."""
