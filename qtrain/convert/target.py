"""What a runtime computes with integers, and so where a student for it is quantized."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, final

from qtrain.convert.operation_nodes import KINDS

LAYERS = ("conv_transpose", "bias_of_many_axes")
"""What of layers a target may compute in floating point: transposed convolutions, and the biases of linear layers whose
inputs have more than two axes."""


@final
@dataclass(frozen=True, kw_only=True)
class Target:
    """The runtime that a student is made for.

    ``operations`` are bits of the operands of operations beside the layers, by kind; kinds that are not among them stay
    in floating point. Of a residual sum, ``sums`` quantizes ``both`` operands, or the ``shortcut`` alone where the
    runtime merges the sum into the layer before it. ``weight_bits`` and ``input_bits`` are the widths that it computes
    with; fewer bits are computed in the next of these, so that only the file is shorter. ``in_float`` says why a kind
    of operation is computed in floating point even so, except for the functions named in ``integer_functions``;
    ``layers_in_float`` says so of :data:`LAYERS`. With ``between_codes`` the runtime computes an operation with
    integers only where all that reads what it gives quantizes it at once; without, wherever it reads codes.
    Raises ``ValueError`` for a kind that does not exist.
    """

    name: str
    operations: Mapping[str, int]
    sums: Literal["both", "shortcut"]
    weight_bits: Sequence[int] = (8,)
    input_bits: Sequence[int] = (8,)
    in_float: Mapping[str, str] = field(default_factory=dict)
    integer_functions: Sequence[str] = ()
    layers_in_float: Mapping[str, str] = field(default_factory=dict)
    between_codes: bool = False

    def __post_init__(self) -> None:
        if unknown := {*self.operations, *self.in_float} - set(KINDS):
            raise ValueError(f"Target: {self.name} has no kind {sorted(unknown)}; use {sorted(KINDS)}")
        if unknown := set(self.layers_in_float) - set(LAYERS):
            raise ValueError(f"Target: layers_in_float has no kind {sorted(unknown)}; use {sorted(LAYERS)}")
        if self.sums not in ("both", "shortcut"):
            raise ValueError(f"Target: sums must be both or shortcut, got {self.sums!r}")
