"""The quantizer's interface: a module that rounds values in training and gives their codes for storage.

Every quantizer in ``conf/quantizer`` obeys these laws, which one parametrized test checks: in eval mode ``forward(x)``
equals ``quantize(x).dequantize()`` bit for bit; codes lie in range; state survives a save and load; shape and dtype of
the input are those of the output.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Set
from typing import ClassVar, Literal, Protocol, final

import torch
from torch import Tensor, nn

from qtrain.functional.affine import code_range, quantize
from qtrain.spec import Auto, Granularity, Observed, QuantSpec
from qtrain.storage.affine import AffineTensor
from qtrain.storage.base import FloatPart, NumberPart, QTensor
from qtrain.storage.bits import BitStream
from qtrain.storage.codebook import CodebookTensor

Served = Literal["weight", "input"]
CodeRange = Callable[[int, bool], tuple[int, int]]
"""Lowest and highest code for a bit width and a sign."""


class MakeQuantizer(Protocol):
    """A quantizer of a config before its tensor is known: a constructor that lacks only ``spec``."""

    def __call__(self, *, spec: QuantSpec) -> "Quantizer": ...


def full_range(bits: int, signed: bool) -> tuple[int, int]:
    """All codes of two's complement, ``[-2^(b-1), 2^(b-1)-1]``, or of unsigned integers, ``[0, 2^b-1]``."""
    return code_range(bits, signed=signed)


def narrow_range(bits: int, signed: bool) -> tuple[int, int]:
    """As :func:`full_range` without the lowest signed code, so that codes are symmetric about zero."""
    return code_range(bits, signed=signed, narrow=True)


def index_range(bits: int, signed: bool) -> tuple[int, int]:
    """Codes that are indices, ``[0, 2^b-1]``, whatever the sign of the values that they stand for."""
    return 0, 2**bits - 1


def float_parts(**state: Tensor | None) -> dict[str, NumberPart]:
    """``state`` as a quantizer stores it, without what it does not have."""
    return {name: FloatPart(tensor.detach()) for name, tensor in state.items() if tensor is not None}


class Quantizer(nn.Module, ABC):
    """Base of all quantizers. Subclasses are final and implement the four abstract methods.

    All have this state, in 0-dim buffers so that a schedule can change it without a recompilation: ``bits``;
    ``signed``; ``code_low`` and ``code_high``, the code range that follows from them; ``initialized``, whether
    calibration has filled the values. ``enabled`` is a plain switch for calibration and for measuring the
    full-precision model: a disabled quantizer returns its input itself.

    Class attributes say what a method can do: ``widths``, the bit widths that it has; ``serves``, whether it is made
    for weights, inputs or both; ``keeps_zero``, whether zero is one of its values; ``shifts_codes``, whether the range
    of its codes moves with the data's, by a zero point or an offset; ``moves_weight``, whether a weight itself learns,
    which then may decay; ``switchable``, whether ``bits`` may change after construction. Anything else is refused with
    a ``ValueError``.
    """

    widths: ClassVar[range] = range(1, 17)
    serves: ClassVar[Set[Served]] = frozenset({"weight", "input"})
    keeps_zero: ClassVar[bool] = True
    shifts_codes: ClassVar[bool] = False
    moves_weight: ClassVar[bool] = True
    switchable: ClassVar[bool] = True

    bits: Tensor
    signed: Tensor
    code_low: Tensor
    code_high: Tensor
    initialized: Tensor
    made_by: MakeQuantizer | None = None
    """The constructor that conversion called, for a student's file to name."""

    def __init__(self, *, spec: QuantSpec, granularity: Granularity, codes: CodeRange = full_range) -> None:
        super().__init__()
        self.spec = spec
        self.granularity = granularity.of(spec.shape) if isinstance(granularity, Auto) else granularity
        self._codes = codes
        self.enabled = True
        served: Served = "weight" if spec.is_weight else "input"
        if served not in self.serves:
            other = "an input" if served == "input" else "a weight"
            raise ValueError(
                f"{type(self).__name__}: quantizes {' and '.join(sorted(self.serves))}s only, not {other}; "
                f"name another quantizer for quantize.{served}, lsq for instance"
            )
        self.state_shape = self.granularity.state_shape(spec.shape)
        for name, value in (("bits", spec.bits), ("signed", True), ("initialized", False)):
            self.register_buffer(name, torch.tensor(value))
        for name in ("code_low", "code_high"):
            self.register_buffer(name, torch.zeros(()))
        # An open sign counts as signed until calibration has seen the data, unless one bit leaves no choice.
        self.set_range_(bits=spec.bits, signed=spec.bits > 1 if spec.signed is None else spec.signed)

    @final  # type: ignore[misc] # nn.Module declares forward as an attribute
    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantized ``x``: same shape and dtype, differentiable in ``x`` and in what the quantizer learns."""
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
    def stored_state(self) -> Mapping[str, NumberPart]:
        """What a deployed model stores of an input's quantizer (scales, zero points), as views of the live tensors.

        With the constructor's options, bits and sign they make the quantizer again. What is computed from the input at
        hand, or follows from bits and sign, is not among them. A weight is stored by :meth:`quantize` instead.
        """

    @final
    def storage_bits(self) -> int:
        """Bits of :meth:`stored_state`, which is all that is stored of an input."""
        return sum(part.nbits for part in self.stored_state().values())

    @final
    @torch.no_grad()
    def load_state_(self, stream: BitStream) -> None:
        """Fill the state in place from the bits of :meth:`stored_state`, one part after the other."""
        for part in self.stored_state().values():
            values, stream = part.read(stream)
            part.values.copy_(values)
        self.initialized.fill_(True)

    @final
    def set_range_(self, *, bits: int, signed: bool) -> None:
        """Set ``bits`` and ``signed``, and the code range that follows from them; of inner quantizers too."""
        name = type(self).__name__
        if bits not in self.widths:
            few = f"{self.widths[0]}..{self.widths[-1]}" if len(self.widths) > 3 else " or ".join(map(str, self.widths))
            raise ValueError(f"{name}: bits must be {few}, got {bits}; take another quantizer for this width")
        if bits != self.spec.bits and not self.switchable:
            raise ValueError(
                f"{name}: its tables were made for {self.spec.bits} bits and cannot become {bits}; "
                "convert the model anew with the other width"
            )
        low, high = self._codes(bits, signed)
        if high < 1:
            raise ValueError(
                f"{name}: {bits} bit(s) signed leave no positive code; use at least 2 bits, or a binary quantizer"
            )
        for buffer, value in ((self.bits, bits), (self.signed, signed), (self.code_low, low), (self.code_high, high)):
            buffer.fill_(value)
        for inner in self.children():
            if isinstance(inner, Quantizer):
                inner.set_range_(bits=bits, signed=signed)

    @final
    def choose_sign_(self, observed: Observed) -> None:
        """Let the data decide where the spec left it open: unsigned codes if nothing negative was seen."""
        if self.spec.signed is None:
            self.set_range_(bits=int(self.bits), signed=bool((observed.low < 0).any()))

    @final
    def spread(self, state: Tensor, x: Tensor) -> Tensor:
        """A state tensor as it broadcasts against ``x``."""
        return self.granularity.expand(state, tuple(x.shape))

    @final
    def affine_tensor(
        self, x: Tensor, scale: Tensor, zero_point: Tensor | None = None, offset: Tensor | None = None
    ) -> AffineTensor:
        """``x`` stored by the uniform rule, which many methods end in: see :class:`AffineTensor`.

        ``codes = clamp(round((x - offset) / scale) + zero_point)``; the state tensors have the state shape.
        """
        shifted = x.detach() if offset is None else x.detach().float() - self.spread(offset.detach(), x)
        zero = None if zero_point is None else zero_point.detach()
        return AffineTensor(
            codes=quantize(
                shifted,
                self.spread(scale.detach(), x),
                self.code_low,
                self.code_high,
                None if zero is None else self.spread(zero, x),
            ),
            bits=int(self.bits),
            low=int(self.code_low),
            high=int(self.code_high),
            dtype=x.dtype,
            scale=scale.detach().clone(),
            zero_point=None if zero is None else zero.to(torch.int32),
            offset=None if offset is None else offset.detach().clone(),
            granularity=self.granularity,
        )

    @final
    def codebook_tensor(
        self, x: Tensor, indices: Tensor, codebook: Tensor, *, huffman: bool = False, operand: int = 32
    ) -> CodebookTensor:
        """``x`` stored as ``indices`` into ``codebook`` (*state, K): see :class:`CodebookTensor`."""
        return CodebookTensor(
            codes=indices.to(torch.int32),
            bits=int(self.bits),
            low=int(self.code_low),
            high=int(self.code_high),
            dtype=x.dtype,
            codebook=codebook.detach().clone(),
            granularity=self.granularity,
            huffman=huffman,
            operand=operand,
        )

    def extra_repr(self) -> str:
        sign = "signed" if bool(self.signed) else "unsigned"
        return f"bits={int(self.bits)}, {sign}, {self.granularity}, initialized={bool(self.initialized)}"
