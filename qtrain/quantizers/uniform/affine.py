"""Static affine quantization: scale and zero point from calibration, not learned."""

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor, nn

from qtrain.functional.affine import asymmetric_scale, fake_quantize, symmetric_scale
from qtrain.quantizers.base import Quantizer, float_parts, full_range, narrow_range
from qtrain.spec import Granularity, Observed, PerTensor, QuantSpec
from qtrain.storage.base import IntegerPart, NumberPart, QTensor


@final
class Affine(Quantizer):
    """``q = clamp(round(x / s) + z, Qn, Qp)`` with ``s``, ``z`` set by :meth:`calibrate_` (Jacob 2018, 1712.05877).

    ``symmetric`` fixes ``z = 0``; otherwise codes are unsigned and ``z`` makes zero exactly representable.
    ``narrow`` leaves out the lowest signed code, so that the range is symmetric about zero (Krishnamoorthi 2018).
    The gradient passes inside the range and is zero outside.
    """

    scale: Tensor
    zero_point: Tensor | None

    def __init__(
        self,
        *,
        spec: QuantSpec,
        granularity: Granularity = PerTensor(),  # noqa: B008 - frozen
        symmetric: bool = True,
        narrow: bool = False,
    ) -> None:
        super().__init__(spec=spec, granularity=granularity, codes=narrow_range if narrow else full_range)
        self.register_buffer("scale", torch.ones(self.state_shape))
        self.register_buffer("zero_point", None if symmetric else torch.zeros(self.state_shape))
        vars(self).update(shifts_codes=not symmetric)
        if not symmetric:
            self.set_range_(bits=spec.bits, signed=False)

    def fake_quantize(self, x: Tensor) -> Tensor:
        zero_point = None if self.zero_point is None else self.spread(self.zero_point, x)
        return fake_quantize(x, self.spread(self.scale, x), self.code_low, self.code_high, zero_point)

    def quantize(self, x: Tensor) -> QTensor:
        return self.affine_tensor(x, self.scale, self.zero_point)

    @torch.no_grad()
    def calibrate_(self, observed: Observed) -> None:
        if self.zero_point is None:
            self.choose_sign_(observed)
            self.scale.copy_(symmetric_scale(observed.low, observed.high, self.code_low, self.code_high))
        else:
            scale, zero_point = asymmetric_scale(observed.low, observed.high, self.code_low, self.code_high)
            self.scale.copy_(scale)
            self.zero_point.copy_(zero_point)
        self.initialized.fill_(True)

    @torch.no_grad()
    def rescale_(self, factor: Tensor) -> dict[nn.Parameter, Tensor]:
        self.scale.mul_(factor)
        if self.zero_point is not None:  # so that the lowest value, -z s, stays, as nearly as a whole z can
            self.zero_point.copy_((self.zero_point / factor).round().clamp(self.code_low, self.code_high))
        return {}

    def step(self) -> Tensor:
        return self.scale

    def stored_state(self) -> Mapping[str, NumberPart]:
        stored = float_parts(scale=self.scale)
        if self.zero_point is not None:
            stored["zero_point"] = IntegerPart(self.zero_point, int(self.bits), int(self.code_low))
        return stored
