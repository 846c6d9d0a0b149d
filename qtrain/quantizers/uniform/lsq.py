"""Learned step size quantization (LSQ): the scale is trained with the weights."""

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor, nn

from qtrain.functional.affine import fake_quantize, symmetric_scale
from qtrain.functional.learned_step import SMALLEST_SCALE, step_gradient_factor
from qtrain.functional.ste import scale_gradient
from qtrain.quantizers.base import Quantizer, float_parts
from qtrain.spec import Granularity, Observed, PerTensor, QuantSpec
from qtrain.storage.base import NumberPart, QTensor


@final
class LSQ(Quantizer):
    """``x^ = round(clamp(x / s, Qn, Qp)) s`` with ``s`` learned (Esser et al. 2020, arXiv 1902.08153, eq. 1-3).

    The step's gradient is scaled by ``1 / sqrt(N Qp)`` (§2.2), N the elements that share the step: of a weight, those
    of one granularity group; of an activation, those of one sample. ``init`` says where calibration starts the step:
    ``mean_abs`` as the paper, ``2 mean|x| / sqrt(Qp)`` (§2.1), or ``range`` so that the observed range just fits the
    codes, which with the squared-error observer is the least-squares step.
    """

    scale: nn.Parameter

    def __init__(
        self,
        *,
        spec: QuantSpec,
        granularity: Granularity = PerTensor(),  # noqa: B008 - frozen
        init: str = "mean_abs",
    ) -> None:
        if init not in ("mean_abs", "range"):
            raise ValueError(f"LSQ: init must be 'mean_abs' or 'range', got {init!r}")
        super().__init__(spec=spec, granularity=granularity)
        self.init = init
        self.scale = nn.Parameter(torch.ones(self.state_shape))

    def step(self) -> Tensor:
        """The step in use: the parameter's magnitude, never zero; shape of the state."""
        return self.scale.abs().clamp(min=SMALLEST_SCALE)

    def fake_quantize(self, x: Tensor) -> Tensor:
        factor = step_gradient_factor(x, self.scale.numel(), self.code_high, is_weight=self.spec.is_weight)
        step = scale_gradient(self.step(), factor)
        return fake_quantize(x, self.spread(step, x), self.code_low, self.code_high)

    def quantize(self, x: Tensor) -> QTensor:
        return self.affine_tensor(x, self.step())

    @torch.no_grad()
    def calibrate_(self, observed: Observed) -> None:
        self.choose_sign_(observed)
        if self.init == "mean_abs":
            step = 2 * observed.mean_abs / self.code_high.sqrt()
            step = torch.where(step > 0, step, torch.ones_like(step))
        else:
            step = symmetric_scale(observed.low, observed.high, self.code_low, self.code_high)
        self.scale.copy_(step)
        self.initialized.fill_(True)

    @torch.no_grad()
    def rescale_(self, factor: Tensor) -> dict[nn.Parameter, Tensor]:
        self.scale.mul_(factor)
        return {self.scale: 1 / factor}

    def stored_state(self) -> Mapping[str, NumberPart]:
        return float_parts(scale=self.scale)
