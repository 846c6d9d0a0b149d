"""OCP Microscaling formats: 32 small floating-point numbers under one power of two."""

from collections.abc import Mapping
from typing import ClassVar, final

import torch
from torch import Tensor

from qtrain.functional.affine import require_finite
from qtrain.functional.powers import power_below
from qtrain.functional.ste import straight_through
from qtrain.quantizers.base import Quantizer, index_range
from qtrain.spec import Observed, PerTensor, QuantSpec
from qtrain.spec.blocks import Blocks
from qtrain.storage.base import NumberPart, QTensor
from qtrain.storage.elements import ELEMENTS, Element
from qtrain.storage.microscaled import MicroscaledTensor, power_codes

BLOCK = 32
LEAST_SCALE = 2.0**-126
"""E8M0 has 2^-127 too, but as a float32 that is subnormal, and some devices would divide by zero."""

AUTO = {4: "e2m1", 6: "e2m3", 8: "e4m3"}


def round_to_element(t: Tensor, smallest: Tensor, steps: Tensor, largest: Tensor) -> Tensor:
    """``t``, float32, to the nearest number of an element format, ties to even, saturating (OCP MX 1.0, section 5.3).

    0-dim: ``smallest`` normal number, ``steps`` from one power of two to the next, ``largest`` number.
    """
    step = torch.maximum(power_below(t.abs()), smallest) / steps
    return ((t / step).round() * step).clamp(-largest, largest)


def _figures(element: Element) -> list[float]:
    return [2.0**element.largest_exponent, 2.0**element.smallest_exponent, 2.0**element.mantissa_bits, element.largest]


@final
class OcpMx(Quantizer):
    """``x^ = X round(x / X)``, to the nearest element; ``X = 2^(floor(log2 max|x|) - emax)`` for each 32 (§6.3).

    Open Compute Project, Microscaling Formats (MX) Specification 1.0; training with them: arXiv 2310.10537. Blocks lie
    along the spec's channel axis, the last may be short, and scales are computed from the tensor at hand: there is no
    state. ``element`` is ``e2m1`` (MXFP4), ``e2m3`` or ``e3m2`` (MXFP6), ``e4m3`` or ``e5m2`` (MXFP8), ``int8``
    (MXINT8); ``auto`` goes by the bits, 4: ``e2m1``, 6: ``e2m3``, 8: ``e4m3``, and follows when they change.

    The gradient passes everywhere. Only values near a block's largest saturate, within a factor of ``2^(emax+1) /
    max``; a saturated weight without gradient could never leave that place.
    """

    widths: ClassVar[range] = range(4, 9, 2)

    figures: Tensor

    def __init__(self, *, spec: QuantSpec, element: str = "auto") -> None:
        if element != "auto" and element not in ELEMENTS:
            raise ValueError(f"OcpMx: element must be 'auto' or one of {list(ELEMENTS)}, got {element!r}")
        by_bits = AUTO if element == "auto" else {ELEMENTS[element].bits: element}
        if spec.bits not in by_bits:
            some = " or ".join(map(str, by_bits))
            raise ValueError(f"OcpMx: bits must be {some} for element {element!r}, got {spec.bits}; or name another")
        if element != "auto":
            vars(self).update(widths=range(spec.bits, spec.bits + 1))
        super().__init__(spec=spec, granularity=PerTensor(), codes=index_range)
        self.by_bits = by_bits
        self.blocks = Blocks(size=BLOCK, axis=spec.channel_axis)
        table = [_figures(ELEMENTS[by_bits.get(bits, by_bits[spec.bits])]) for bits in AUTO]
        self.register_buffer("figures", torch.tensor(table))

    def scaled(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Elements, float32, shape of ``x``, and the power of two of each block."""
        row = ((self.bits - 4) // 2).reshape(1)
        largest_power, smallest, steps, largest = self.figures.index_select(0, row)[0].unbind()
        values = x.detach().float()
        scale = (power_below(self.blocks.largest(values.abs())) / largest_power).clamp(min=LEAST_SCALE)
        # Scales are powers of two, so a product with the reciprocal is the quotient, and there are few reciprocals.
        t = values * self.blocks.spread(1 / scale, tuple(x.shape))
        return round_to_element(t, smallest, steps, largest), scale

    def fake_quantize(self, x: Tensor) -> Tensor:
        elements, scale = self.scaled(x)
        return straight_through((elements * self.blocks.spread(scale, tuple(x.shape))).to(x.dtype), x)

    def quantize(self, x: Tensor) -> QTensor:
        require_finite(x)
        elements, scale = self.scaled(x)
        bits = int(self.bits)
        return MicroscaledTensor(
            codes=ELEMENTS[self.by_bits[bits]].encode(elements),
            bits=bits,
            low=int(self.code_low),
            high=int(self.code_high),
            dtype=x.dtype,
            exponent=power_codes(scale),
            element=self.by_bits[bits],
            blocks=self.blocks,
        )

    @torch.no_grad()
    def calibrate_(self, observed: Observed) -> None:
        self.initialized.fill_(True)

    def stored_state(self) -> Mapping[str, NumberPart]:
        return {}
