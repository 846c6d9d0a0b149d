"""DoReFa: weights squeezed by tanh into [-1, 1], activations clipped to [0, 1]."""

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from qtrain.functional.affine import fake_quantize, require_finite
from qtrain.functional.ste import straight_through
from qtrain.quantizers.base import Quantizer, index_range, narrow_range
from qtrain.spec import Observed, PerTensor, QuantSpec
from qtrain.storage.affine import AffineTensor
from qtrain.storage.base import NumberPart, QTensor


def squeeze(weight: Tensor) -> Tensor:
    """``tanh(w) / (2 max|tanh(w)|) + 1/2``, in [0, 1]; the maximum is over the whole tensor (eq. 9). All zero: 1/2."""
    bounded = weight.float().tanh()
    largest = bounded.abs().amax() if bounded.numel() else bounded.new_ones(())
    return bounded / (2 * torch.where(largest > 0, largest, 1.0)) + 0.5


def weight_codes(weight: Tensor, bits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes 0 .. 2^b-1 (float32, shape of ``weight``), scale and offset (0-dim): the value is code * scale + offset.

    ``b > 1``: ``2 quantize_b(squeeze(w)) - 1`` (eq. 9); ``b = 1``: ``sign(w) mean|w|``, sign(0) = 1 (eq. 8).
    """
    mean = weight.float().abs().mean() if weight.numel() else weight.new_zeros((), dtype=torch.float32)
    steps = torch.exp2(bits.float()) - 1
    binary = bits == 1
    codes = torch.where(binary, (weight >= 0).float(), (squeeze(weight) * steps).round())
    return codes, torch.where(binary, 2 * mean, 2 / steps), torch.where(binary, -mean, -1.0)


@final
class DoReFa(Quantizer):
    """DoReFa-Net's weights and activations (Zhou et al. 2016, arXiv 1606.06160, §2.3, 2.4).

    Weights: :func:`weight_codes`, a function of the weight at hand alone; the gradient is that of the formula without
    the rounding, and passes unchanged at 1 bit. Values lie in [-1, 1] whatever the weight's own scale, which a batch
    norm behind the layer absorbs. Inputs: ``quantize_b(clip(x, 0, 1))``, and ``clip(x, -1, 1)`` with symmetric codes
    where calibration saw negative values. Only that sign is calibrated, and nothing is learned. Gradients are quantized
    by ``qtrain.nn.gradient``. Inputs can be zero. Weights cannot, because the number of their levels is even.
    """

    def __init__(self, *, spec: QuantSpec) -> None:
        super().__init__(spec=spec, granularity=PerTensor(), codes=index_range if spec.is_weight else narrow_range)
        vars(self).update(keeps_zero=not spec.is_weight)

    def fake_quantize(self, x: Tensor) -> Tensor:
        if not self.spec.is_weight:
            return fake_quantize(x, 1 / self.code_high, self.code_low, self.code_high)
        codes, scale, offset = weight_codes(x.detach(), self.bits)
        smooth = torch.where(self.bits == 1, x.float(), 2 * squeeze(x) - 1)
        return straight_through((codes * scale + offset).to(x.dtype), smooth.to(x.dtype))

    def quantize(self, x: Tensor) -> QTensor:
        if not self.spec.is_weight:
            return self.affine_tensor(x, 1 / self.code_high)
        require_finite(x)
        codes, scale, offset = weight_codes(x.detach(), self.bits)
        return AffineTensor(
            codes=codes.to(torch.int32),
            bits=int(self.bits),
            low=int(self.code_low),
            high=int(self.code_high),
            dtype=x.dtype,
            scale=scale,
            offset=offset,
        )

    @torch.no_grad()
    def calibrate_(self, observed: Observed) -> None:
        self.choose_sign_(observed)
        self.initialized.fill_(True)

    def stored_state(self) -> Mapping[str, NumberPart]:
        return {}
