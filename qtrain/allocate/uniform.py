"""The same bits for every layer, with settings of their own for the first and the last ones."""

from collections.abc import Sequence
from typing import final

from qtrain.spec import FULL_PRECISION, Allocation, LayerBits, LayerNames


@final
class Uniform:
    """``weight`` and ``input`` bits for all layers but the first and the last ones (:class:`qtrain.spec.LayerNames`).

    The first read the image, and the output of the last becomes the logits. ``first`` and ``last`` are pairs of their
    own, or ``None`` to be treated as the rest; the field keeps both at 8 bits or in full precision (32), since they
    hold few weights and cost most accuracy. A layer at both ends has the bits of ``last``, if there are any.
    """

    def __init__(
        self, *, weight: int, input: int, first: LayerBits | None = None, last: LayerBits | None = None
    ) -> None:
        self.rest = checked("Uniform: ", LayerBits(weight, input))
        self.first = checked("Uniform: first.", first or self.rest)
        self.last = checked("Uniform: last.", last or self.rest)
        self._both = last or self.first

    def __call__(self, layers: Sequence[str]) -> Allocation:
        """Bits for ``layers``, the qualified names of the quantizable layers in the order in which they run."""
        names = LayerNames.of(layers)
        both = {n: self._both for n in names if n in names.first and n in names.last}
        ends = {**dict.fromkeys(names.first, self.first), **dict.fromkeys(names.last, self.last), **both}
        return {n: ends.get(n, self.rest) for n in names}


def checked(where: str, bits: LayerBits) -> LayerBits:
    """``bits``, if a quantizer may have them. Raises ``ValueError`` that begins with ``where``."""
    for name, value in zip(LayerBits._fields, bits, strict=True):
        if value != FULL_PRECISION and not 1 <= value <= 16:
            raise ValueError(f"{where}{name} must be 1..16 bits, or {FULL_PRECISION} for full precision, got {value}")
    return bits
