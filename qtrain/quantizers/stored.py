"""The weight quantizer of a student that was loaded: its layer's weight has the stored values already."""

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from qtrain.quantizers.base import Quantizer
from qtrain.spec import Observed, PerTensor, QuantSpec
from qtrain.storage.base import NumberPart, QTensor, unpack


@final
class Stored(Quantizer):
    """The identity, beside the bytes of the weight that it stands for: ``quantize`` gives the tensor as it was stored.

    ``packed`` (n,) uint8 are the bytes of :func:`qtrain.storage.base.pack`, ``like`` says what they are, and ``shape``
    is that of the weight as it is multiplied, (O, I, ...). ``method`` names the quantizer that rounded it. Such weights
    cannot be calibrated or trained.
    """

    switchable = False
    packed: Tensor

    def __init__(self, *, like: QTensor, packed: Tensor, shape: tuple[int, ...], method: str) -> None:
        spec = QuantSpec(bits=like.bits, shape=shape, signed=True)
        super().__init__(spec=spec, granularity=PerTensor(), codes=lambda *_: (like.low, like.high))
        self.like, self.method = like, method
        self.register_buffer("packed", packed)
        self.initialized.fill_(True)

    def fake_quantize(self, x: Tensor) -> Tensor:
        return x

    def quantize(self, x: Tensor) -> QTensor:
        """The stored tensor; ``x``, which is the same in floating point, is not looked at."""
        return unpack(self.packed.cpu().numpy(), self.like)

    def calibrate_(self, observed: Observed) -> None:
        raise ValueError("Stored: a loaded student is not calibrated again; quantize the full-precision model instead")

    def stored_state(self) -> Mapping[str, NumberPart]:
        return {}


def values_of(packed: Tensor, like: QTensor) -> Tensor:
    """The values that ``packed`` (n,) uint8 stands for, of the weight's shape, (O, I, ...)."""
    with torch.no_grad():
        return unpack(packed.cpu().numpy(), like).dequantize()
