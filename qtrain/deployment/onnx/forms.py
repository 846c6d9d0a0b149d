"""What ONNX can say of an input's quantizer: whole numbers with a scale and a zero point, or that it has no form."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qtrain.quantizers.base import Quantizer
from qtrain.quantizers.binary.binary import Binary
from qtrain.spec import PerChannel
from qtrain.storage.affine import AffineTensor

WIDEST = 16
"""Bits of the widest code of an input or a weight: ONNX quantizes to 8 and to 16 bits."""


class NoFormError(ValueError):
    """A quantizer that ONNX cannot express; the message is the reason."""


@dataclass(frozen=True)
class Codes:
    """``value = (code - zero_point) scale + offset`` with ``low <= code <= high``, as the runtime stores it.

    Before a layer reads codes of few bits, they are shifted to the left by ``shift``, as far as the type goes. Their
    values stay; but the scale of the layer's sums becomes finer, and with it what its bias is rounded to. ``dtype`` is
    the type of the stored codes. ``scale`` and ``zero_point`` have no axes, or one for the channels of ``axis``.
    ``offset`` is a number that is added in floating point, ``None`` where there is none.

    Signs have a ``threshold``, no axes, and the codes 0 below it and 1 from there on, which stand for half a scale less
    and half a scale more than zero: their zero point is 1/2 before the shift.
    """

    scale: Tensor
    zero_point: Tensor
    low: int
    high: int
    dtype: torch.dtype
    shift: int = 0
    axis: int | None = None
    offset: Tensor | None = None
    threshold: Tensor | None = None

    @property
    def shifted_zero_point(self) -> Tensor:
        """The code of zero that a layer reads."""
        if self.threshold is not None:
            return torch.tensor(2 ** (self.shift - 1)).to(self.dtype)
        return (self.zero_point.to(torch.int64) << self.shift).to(self.dtype)

    def steps(self, x: Tensor, *, shifted: bool = False) -> Tensor:
        """``x``, or ``x - offset`` if ``shifted``, in units of the scale; codes change at the halves."""
        scale = along(self.scale, self.axis, x.ndim).to(x.dtype)
        if self.threshold is not None:
            return ((x - self.threshold) / scale + 0.5).clamp(0, 1)
        return (x if shifted or self.offset is None else x - along(self.offset, self.axis, x.ndim)) / scale

    @property
    def step(self) -> Tensor:
        """The scale of the codes that a layer reads, which are larger by ``2^shift``."""
        finer: Tensor = self.scale / 2**self.shift
        return finer

    @property
    def clipped(self) -> bool:
        """Whether the type holds more codes than there are."""
        held = torch.iinfo(self.dtype)
        return (self.low, self.high) != (held.min, held.max)


@torch.no_grad()
def input_codes(quantizer: Quantizer) -> Codes:
    """The codes of an input's quantizer; unsigned, since runtimes fuse a ReLU only into these, and from 0.

    Raises :class:`NoFormError` where the scale depends on
    the input at hand, or where the values are not evenly spaced.
    """
    name = type(quantizer).__name__
    if getattr(quantizer, "output_factor", None) is not None and getattr(quantizer, "scale_map", True):
        raise NoFormError(f"{name} multiplies the layer's output by a factor of each input")
    if isinstance(quantizer, Binary):
        return _signs(quantizer)
    first = quantizer.quantize(_probe(quantizer, reach=1.0))
    if not isinstance(first, AffineTensor):
        raise NoFormError(f"the values of {name} are not evenly spaced")
    wide = _probe(quantizer, reach=1.5 * float(first.scale.max()) * max(-first.low, first.high))
    second = quantizer.quantize(wide)
    assert isinstance(second, AffineTensor)
    if not (_same(first.scale, second.scale) and _same(first.zero_point, second.zero_point)):
        raise NoFormError(f"{name} takes its scale from each input")
    plain = quantizer.affine_tensor(wide, first.scale, first.zero_point, first.offset)
    if not torch.equal(plain.codes, second.codes):
        raise NoFormError(f"{name} rounds by another rule than to the nearest multiple of its scale")
    if first.bits > WIDEST:
        raise NoFormError(f"{first.bits} bits are more than the {WIDEST} that ONNX has")
    per_tensor = first.scale.numel() == 1
    if not (per_tensor or isinstance(first.granularity, PerChannel)):
        raise NoFormError(f"ONNX has no scales of {type(first.granularity).__name__}")
    dtype = torch.uint8 if first.high - first.low < 256 else torch.uint16
    room = (torch.iinfo(dtype).max + 1) // (first.high - first.low + 1)
    zero = torch.zeros_like(first.scale) if first.zero_point is None else first.zero_point
    flat = () if per_tensor else (-1,)
    return Codes(
        scale=first.scale.float().reshape(flat),
        zero_point=(zero.to(torch.int64) - first.low).reshape(flat).to(dtype),
        low=0,
        high=first.high - first.low,
        dtype=dtype,
        shift=room.bit_length() - 1,
        axis=None if per_tensor else quantizer.spec.channel_axis,
        offset=None if first.offset is None or not first.offset.any() else first.offset.float().reshape(flat),
    )


def gate_steps(codes: Codes) -> int | None:
    """How many steps 3 is, where that is a whole number and -3 has a code; ``None`` where not.

    Then the gate ``clip(x + 3, 0, 6) / 6`` of ``x = (q - z) s`` is ``(clip(q, z - n, z + n) - (z - n)) s / 6``: the
    codes themselves, clipped, with another scale and zero point.
    """
    if codes.dtype != torch.uint8 or codes.axis is not None or codes.offset is not None or codes.threshold is not None:
        return None
    steps = 3 / float(codes.scale)
    whole = round(steps)
    return whole if 1 <= whole <= int(codes.zero_point) and abs(steps - whole) <= 2**-20 * whole else None


def _signs(quantizer: Binary) -> Codes:
    probe = torch.zeros(1, device=quantizer.bits.device)
    alpha, threshold = quantizer.factor(probe), quantizer.threshold
    name = type(quantizer).__name__
    if threshold is None or threshold.numel() != 1 or (alpha is not None and alpha.numel() != 1):
        raise NoFormError(f"the signs of {name} have several thresholds or factors")
    if alpha is not None and not alpha > 0:
        raise NoFormError(f"the factor of {name} is {float(alpha):.3g}, not positive")
    one = torch.ones(()) if alpha is None else alpha.float().reshape(())
    zero = torch.zeros((), dtype=torch.uint8)
    return Codes(2 * one, zero, low=0, high=1, dtype=torch.uint8, shift=7, threshold=threshold.float().reshape(()))


def along(state: Tensor, axis: int | None, dimensions: int) -> Tensor:
    """A scale or zero point, () or (n,), as it broadcasts against a tensor of so many ``dimensions``."""
    if state.numel() == 1:
        return state.reshape(())
    if axis is None:
        raise ValueError(f"{state.numel()} scales of a tensor need an axis")
    return state.reshape([-1 if place == axis % dimensions else 1 for place in range(dimensions)])


def _probe(quantizer: Quantizer, *, reach: float) -> Tensor:
    """Values from ``-reach`` to ``reach``, (2, C, 16, 16), with as many channels as the quantizer has scales."""
    channels = max(1, *quantizer.state_shape) if quantizer.state_shape else 1
    values = torch.linspace(-reach, reach, 512, device=quantizer.bits.device).reshape(2, 1, 16, 16)
    return values.expand(2, channels, 16, 16).contiguous()


def _same(first: Tensor | None, second: Tensor | None) -> bool:
    return first is second is None or (first is not None and second is not None and torch.equal(first, second))
