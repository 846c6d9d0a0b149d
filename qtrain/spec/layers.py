"""The names of a model's layers, and which of them stand at its two ends."""

from collections.abc import Iterable, Sequence
from typing import final


@final
class LayerNames(tuple[str, ...]):
    """Names of layers in the order in which they run.

    ``first`` are the layers that read the image, ``last`` those whose output becomes the logits with no other weighted
    layer between. A model with a second head, or with branches from the image on, has several of them. Where nothing is
    known of this, they are the first and the last name.

    >>> names = LayerNames(["stem", "block", "head", "head_dist"], last=["head", "head_dist"])
    >>> names.first, sorted(names.last)
    (frozenset({'stem'}), ['head', 'head_dist'])
    """

    first: frozenset[str]
    last: frozenset[str]

    def __new__(
        cls, names: Iterable[str] = (), *, first: Iterable[str] | None = None, last: Iterable[str] | None = None
    ) -> "LayerNames":
        made = super().__new__(cls, names)
        made.first = frozenset(made[:1] if first is None else first)
        made.last = frozenset(made[-1:] if last is None else last)
        return made

    @classmethod
    def of(cls, names: Sequence[str]) -> "LayerNames":
        """``names`` with what is known of their ends."""
        return names if isinstance(names, cls) else cls(names)

    @property
    def ends(self) -> tuple[str, ...]:
        """The first and the last layers, in order."""
        return tuple(name for name in self if name in self.first | self.last)
