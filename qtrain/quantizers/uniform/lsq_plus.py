"""LSQ+: the step is learned, and for inputs the offset too."""

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor, nn

from qtrain.functional.affine import fake_quantize, symmetric_scale
from qtrain.functional.learned_step import SMALLEST_SCALE, step_gradient_factor
from qtrain.functional.ste import fake_quantize_ste, scale_gradient
from qtrain.quantizers.base import Quantizer, float_parts, full_range, index_range
from qtrain.spec import Granularity, Observed, PerTensor, QuantSpec
from qtrain.storage.base import NumberPart, QTensor


@final
class LSQPlus(Quantizer):
    """LSQ with an offset for inputs and a start that outliers do not move (Bhalgat et al. 2020, arXiv 2004.09576).

    Weights are symmetric, without offset, and start at ``s = max(|mu - 3 sigma|, |mu + 3 sigma|) / 2^(b-1)`` (eq. 6),
    mean and deviation of each granularity group. Inputs have unsigned codes and a learned offset,
    ``x^ = round(clamp((x - b) / s, Qn, Qp)) s + b`` (eq. 3). Both start from the observed range,
    ``s = (high - low) / (2^b - 1)``, ``b = low`` (eq. 7, 8); from there the paper minimizes the squared error, which
    here the observer does. Gradients of step and offset are scaled as in LSQ. Weights can be zero; inputs in general
    cannot.
    """

    scale: nn.Parameter
    offset: nn.Parameter | None

    def __init__(self, *, spec: QuantSpec, granularity: Granularity = PerTensor()) -> None:  # noqa: B008 - frozen
        super().__init__(spec=spec, granularity=granularity, codes=full_range if spec.is_weight else index_range)
        vars(self).update(keeps_zero=spec.is_weight, shifts_codes=not spec.is_weight)
        self.scale = nn.Parameter(torch.ones(self.state_shape))
        self.register_parameter("offset", None if spec.is_weight else nn.Parameter(torch.zeros(self.state_shape)))
        if not spec.is_weight:
            self.set_range_(bits=spec.bits, signed=False)

    def step(self) -> Tensor:
        """The step in use: the parameter's magnitude, never zero; shape of the state."""
        return self.scale.abs().clamp(min=SMALLEST_SCALE)

    def fake_quantize(self, x: Tensor) -> Tensor:
        factor = step_gradient_factor(x, self.scale.numel(), self.code_high, is_weight=self.spec.is_weight)
        step = self.spread(scale_gradient(self.step(), factor), x)
        if self.offset is None:
            return fake_quantize(x, step, self.code_low, self.code_high)
        offset = self.spread(scale_gradient(self.offset, factor), x)
        return fake_quantize_ste(x, step, self.code_low, self.code_high, offset)

    def quantize(self, x: Tensor) -> QTensor:
        return self.affine_tensor(x, self.step(), offset=self.offset)

    @torch.no_grad()
    def calibrate_(self, observed: Observed) -> None:
        if self.offset is not None:
            self.scale.copy_(symmetric_scale(observed.low, observed.high - observed.low, self.code_low, self.code_high))
            self.offset.copy_(observed.low)
        elif observed.tensor is not None:
            rows = self.granularity.flatten(observed.tensor.double())
            mean, three_deviations = rows.mean(dim=1), 3 * rows.std(dim=1, correction=0)
            self._start(torch.maximum((mean - three_deviations).abs(), (mean + three_deviations).abs()))
        else:
            self._start(torch.maximum(observed.low.abs(), observed.high.abs()))
        self.initialized.fill_(True)

    def _start(self, reach: Tensor) -> None:
        step = (reach / (self.code_high + 1)).float().reshape(self.state_shape)
        self.scale.copy_(torch.where(step > 0, step, torch.ones_like(step)))

    @torch.no_grad()
    def rescale_(self, factor: Tensor) -> dict[nn.Parameter, Tensor]:
        self.scale.mul_(factor)
        return {self.scale: 1 / factor}

    def stored_state(self) -> Mapping[str, NumberPart]:
        return float_parts(scale=self.scale, offset=self.offset)
