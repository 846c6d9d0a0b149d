"""What a width of a student of many bits has of its own in the file, and where the payload holds it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from qtrain.packed.stored import StoredInput


@dataclass(frozen=True)
class NarrowLayer:
    """One quantized layer at fewer bits: which of the width's ``quantizers`` it has, counted from 0.

    A weight of ``None`` is that of the widest student, or in full precision; so is an input.
    """

    weight: int | None = None
    input: int | None = None


@dataclass(frozen=True)
class Narrow:
    """What a width below the widest has of its own: ``layers`` by qualified name, each kind of quantizer once.

    The codes of a weight are those of its quantizer for the widest student's weight. Batch norms and the state of the
    quantizers are one entry of the payload, :func:`entry_of`, since an index of them would be longer than many of them:
    the tensors of :func:`norm_entries`, then of each layer by name :func:`rounding_of` and
    :func:`qtrain.packed.stored.state_of`.
    """

    quantizers: tuple[StoredInput, ...]
    layers: dict[str, NarrowLayer]

    def __post_init__(self) -> None:
        for name, layer in self.layers.items():
            for index in (layer.weight, layer.input):
                if index is not None and not 0 <= index < len(self.quantizers):
                    raise ValueError(f"layer {name} is of kind {index}, of which {len(self.quantizers)} are described")


def lacking(widths: Sequence[int], bits: int) -> str:
    """What is wrong with asking for ``bits`` bits of a student of these ``widths``."""
    if not widths:
        return f"bits: the student has one width only, so it cannot have {bits} bits; leave bits out"
    return f"bits: the student has {', '.join(map(str, widths))} bits, not {bits}; take one of these"


def entry_of(bits: int | str) -> str:
    """The entry of the payload with what the width of ``bits`` bits has of its own, as bytes."""
    return f"width/{bits}"


def norm_entries(names: Iterable[str], network: nn.Module) -> list[str]:
    """Those of the entries ``names`` that belong to batch norms of ``network``, of which each width has its own."""
    return [name for name in sorted(names) if isinstance(network.get_submodule(name.rpartition(".")[0]), _BatchNorm)]


def rounding_of(layer: str) -> str:
    """The entry of the payload with the state of the weight quantizer of ``layer``, of a width below the widest."""
    return f"{layer}.weight_quantizer"
