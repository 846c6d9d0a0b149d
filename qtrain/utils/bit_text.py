"""Yes or no for each of many things, as a short text that a cell of a table can hold."""

import base64
import binascii
import zlib

import numpy as np
from numpy.typing import NDArray


def to_text(bits: NDArray[np.bool_]) -> str:
    """``10000:eJwB...`` of ``bits`` (N,): their number, and eight in a byte, compressed, in base 64."""
    return f"{len(bits)}:{base64.b64encode(zlib.compress(np.packbits(bits).tobytes(), 9)).decode('ascii')}"


def from_text(text: str) -> NDArray[np.bool_]:
    """The bits (N,) that :func:`to_text` has written. Raises ``ValueError`` where ``text`` is something else."""
    number, _, coded = text.partition(":")
    try:
        packed = np.frombuffer(zlib.decompress(base64.b64decode(coded, validate=True)), dtype=np.uint8)
        bits = np.unpackbits(packed, count=int(number))
    except (binascii.Error, zlib.error, ValueError) as error:
        raise ValueError(f"{text[:20]!r} is no packed list of bits") from error
    if len(packed) != -(-int(number) // 8):
        raise ValueError(f"{text[:20]!r} says {number} bits and holds {8 * len(packed)}")
    return bits.astype(np.bool_)
