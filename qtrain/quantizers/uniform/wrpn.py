"""WRPN: fixed-point numbers in [-1, 1] and [0, 1], and a wider network to make up for them."""

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from qtrain.functional.affine import fake_quantize
from qtrain.quantizers.base import Quantizer, narrow_range
from qtrain.spec import Observed, PerTensor, QuantSpec
from qtrain.storage.base import NumberPart, QTensor


@final
class WRPN(Quantizer):
    """``w^ = round(clip(w, -1, 1) q) / q``, ``q = 2^(b-1) - 1``; ``x^ = round(clip(x, 0, 1) q) / q``, ``q = 2^b - 1``.

    Mishra et al. 2018, arXiv 1709.01134, §3: of a weight's ``b`` bits one is the sign; the gradient passes inside the
    clip. There is no scale: weights much below ``1 / (2 q)`` become zero, so the method is for weights that are trained
    with it, in a network made wider by the model's ``width``. Inputs in which calibration saw negative values take the
    weights' formula. Only that sign is calibrated, and nothing is learned.
    """

    def __init__(self, *, spec: QuantSpec) -> None:
        super().__init__(spec=spec, granularity=PerTensor(), codes=narrow_range)

    def fake_quantize(self, x: Tensor) -> Tensor:
        return fake_quantize(x, 1 / self.code_high, self.code_low, self.code_high)

    def quantize(self, x: Tensor) -> QTensor:
        return self.affine_tensor(x, 1 / self.code_high)

    @torch.no_grad()
    def calibrate_(self, observed: Observed) -> None:
        self.choose_sign_(observed)
        self.initialized.fill_(True)

    def stored_state(self) -> Mapping[str, NumberPart]:
        return {}
