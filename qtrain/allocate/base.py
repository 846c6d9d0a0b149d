"""What all searches over bits have in common: the uniform bits that they are compared with, and one question."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from qtrain.allocate.problem import Problem
from qtrain.allocate.uniform import Uniform
from qtrain.spec import Allocation, LayerBits


class Search(ABC):
    """An allocator that chooses bits for a budget.

    ``weight`` and ``input`` are the uniform bits that budgets in percent refer to, so that ``100%`` asks for a model
    that costs what these cost. ``first`` and ``last`` are the bits of the layers at the two ends, which keep them;
    ``None`` lets the search choose these as well.
    """

    needs_scores: bool = True
    """Whether the problem must have scores."""

    def __init__(self, *, weight: int, input: int, first: LayerBits | None, last: LayerBits | None) -> None:
        self.reference = Uniform(weight=weight, input=input, first=first, last=last)
        self.first, self.last = first, last

    def __call__(self, layers: Sequence[str]) -> Allocation:
        """The uniform bits that this search is compared with, for a rehearsal: a search needs more than names."""
        return self.reference(layers)

    @abstractmethod
    def search(self, problem: Problem) -> Allocation:
        """Bits for all layers of ``problem``, within its budgets; the same for the same seed."""
