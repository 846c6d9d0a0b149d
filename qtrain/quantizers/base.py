"""What every quantizer is: a module that rounds values in training and gives their codes for storage.

The laws, which one parametrized test holds every quantizer in ``conf/quantizer`` to: in eval mode ``forward(x)``
equals ``quantize(x).dequantize()`` bit for bit; codes lie in range; state survives a save and load; shape and dtype
of the input are those of the output.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import final

import torch
from torch import Tensor, nn

from qtrain.functional.affine import code_range
from qtrain.spec import Granularity, Observed, QTensor, QuantSpec


class Quantizer(nn.Module, ABC):
    """Base of all quantizers. Subclasses are final and implement the three abstract methods.

    State that all share, as 0-dim buffers, because a schedule may change it without a recompilation: ``bits``;
    ``signed``; ``code_low`` and ``code_high``, the code range that follows from them; ``initialized``, whether
    calibration has filled the values. ``enabled`` is a plain switch for calibration and for measuring the
    full-precision model: a disabled quantizer returns its input itself.
    """

    bits: Tensor
    signed: Tensor
    code_low: Tensor
    code_high: Tensor
    initialized: Tensor

    def __init__(self, *, spec: QuantSpec, granularity: Granularity, narrow: bool = False) -> None:
        super().__init__()
        self.spec = spec
        self.granularity = granularity
        self.narrow = narrow
        self.enabled = True
        self.state_shape = granularity.state_shape(spec.shape)
        for name, value in (("bits", spec.bits), ("signed", True), ("initialized", False)):
            self.register_buffer(name, torch.tensor(value))
        for name in ("code_low", "code_high"):
            self.register_buffer(name, torch.zeros(()))
        self.set_range_(bits=spec.bits, signed=spec.signed is not False)

    @final  # type: ignore[misc] # nn.Module declares forward as an attribute
    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantised ``x``: same shape and dtype, differentiable in ``x`` and in what the quantizer learns."""
        return self.fake_quantize(x) if self.enabled else x

    @abstractmethod
    def fake_quantize(self, x: Tensor) -> Tensor:
        """The forward of an enabled quantizer."""

    @abstractmethod
    def quantize(self, x: Tensor) -> QTensor:
        """``x`` as it would be stored. Raises ``ValueError`` where ``x`` is not finite."""

    @abstractmethod
    def calibrate_(self, observed: Observed) -> None:
        """Fill the state in place from what an observer saw, and mark it ``initialized``."""

    @abstractmethod
    def storage_bits(self) -> int:
        """Bits of the decoding state (scales, zero points) that a deployed model stores with this quantizer."""

    @final
    def set_range_(self, *, bits: int, signed: bool) -> None:
        """Set ``bits`` and ``signed``, and the code range that follows from them."""
        low, high = code_range(bits, signed=signed, narrow=self.narrow)
        if high < 1:
            raise ValueError(
                f"{type(self).__name__}: {bits} bit(s) signed leave no positive code; use at least 2 bits, "
                "or a binary quantizer"
            )
        for buffer, value in ((self.bits, bits), (self.signed, signed), (self.code_low, low), (self.code_high, high)):
            buffer.fill_(value)

    @final
    def choose_sign_(self, observed: Observed) -> None:
        """Let the data decide where the spec left it open: unsigned codes if nothing negative was seen."""
        if self.spec.signed is None:
            self.set_range_(bits=int(self.bits), signed=bool((observed.low < 0).any()))

    def extra_repr(self) -> str:
        sign = "signed" if bool(self.signed) else "unsigned"
        return f"bits={int(self.bits)}, {sign}, {self.granularity}, initialized={bool(self.initialized)}"
