"""Bits layer by layer, as someone wrote them down: a person, a search, a paper's table."""

import fnmatch
from collections.abc import Mapping, Sequence
from typing import final

from qtrain.allocate.uniform import Uniform, checked
from qtrain.spec import Allocation, LayerBits
from qtrain.utils.suggestions import close_matches


@final
class Manual:
    """``layers`` maps names, or patterns of names (``layer1.*``), to [weight, input] bits; 32 is full precision.

    A layer's own name comes before any pattern, and of several patterns that fit the last one counts. All other layers
    get ``weight`` and ``input`` bits, the first and the last of them ``first`` and ``last``, as from ``Uniform``.
    """

    def __init__(
        self,
        *,
        layers: Mapping[str, tuple[int, int]] | None = None,
        weight: int,
        input: int,
        first: LayerBits | None = None,
        last: LayerBits | None = None,
    ) -> None:
        named = (layers or {}).items()
        self.layers = {name: checked(f"Manual: layers.{name}.", LayerBits(*bits)) for name, bits in named}
        self.rest = Uniform(weight=weight, input=input, first=first, last=last)

    def __call__(self, layers: Sequence[str]) -> Allocation:
        """Bits for ``layers``, the qualified names of the quantizable layers in the order in which they run.

        Raises ``ValueError`` for a name or a pattern that fits none of them.
        """
        allocation = dict(self.rest(layers))
        fitting = {pattern: fnmatch.filter(layers, pattern) for pattern in self.layers}
        for pattern, names in fitting.items():
            if not names:
                raise ValueError(f"Manual: layers.{pattern} fits no quantizable layer{close_matches(pattern, layers)}")
            allocation |= dict.fromkeys(names, self.layers[pattern])
        return allocation | {name: self.layers[name] for name in layers if name in self.layers}
