"""How the quantizers of a student's layers are stored: kinds, each described once, and which of them a layer has."""

from dataclasses import dataclass

from qtrain.storage.description import Plain


@dataclass(frozen=True)
class StoredWeight:
    """A kind of weight that is stored as codes: ``quantizer`` is the name of its method.

    ``shape`` is that of the weight as it is multiplied, (O, I, ...); ``stored`` describes the codes and what decodes
    them (:mod:`qtrain.storage.description`). ``channels_last`` is the order in memory of the weight that is multiplied,
    by which torch chooses a kernel; it is told by the strides, also of shapes for which both orders are one.
    """

    quantizer: str
    bits: int
    shape: tuple[int, ...]
    stored: Plain
    channels_last: bool = False


@dataclass(frozen=True)
class StoredInput:
    """A kind of input quantizer: ``made_by`` describes its constructor.

    ``signed`` is ``None`` where the constructor knows no sign but its own.
    """

    quantizer: str
    bits: int
    signed: bool
    channel_axis: int
    made_by: Plain
    dtype: str


@dataclass(frozen=True)
class StoredLayer:
    """One quantized layer: which of the header's ``weights`` and ``inputs`` it has, counted from 0.

    A side that stays in full precision is ``None``. ``tied`` names the layer whose weight it shares.
    """

    weight: int | None = None
    input: int | None = None
    tied: str | None = None


def state_of(layer: str) -> str:
    """The entry of the payload with the state of the input quantizer of ``layer``."""
    return f"{layer}.input_quantizer"
