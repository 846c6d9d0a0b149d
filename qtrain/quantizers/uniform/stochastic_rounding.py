"""Uniform quantization that rounds at random in training and to the nearest code in deployment."""

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor, nn

from qtrain.functional.affine import fake_quantize, symmetric_scale
from qtrain.functional.random import keyed_uniform
from qtrain.functional.ranks import place_in_batch
from qtrain.functional.ste import clamp_to, straight_through
from qtrain.functional.stochastic import stochastic_round
from qtrain.quantizers.base import Quantizer, float_parts
from qtrain.spec import Granularity, Observed, PerTensor, QuantSpec
from qtrain.storage.base import NumberPart, QTensor


def stochastic_fake_quantize(x: Tensor, scale: Tensor, low: Tensor, high: Tensor, uniform: Tensor) -> Tensor:
    """``stochastic_round(clamp(x / s, Qn, Qp)) s``, shape and dtype of ``x``, computed in float32.

    Unbiased inside the range. ``scale`` broadcasts against ``x``; ``low`` and ``high`` are 0-dim; ``uniform`` is drawn
    from [0, 1) and has the shape of ``x``. The gradient passes to ``x`` inside the range and is zero outside.
    """
    steps = clamp_to(x.float() / scale, low, high)
    return straight_through(stochastic_round(steps, uniform) * scale, steps * scale).to(x.dtype)


@final
class StochasticRounding(Quantizer):
    """Symmetric affine quantization; in training, codes are rounded up with probability ``x/s - floor(x/s)``.

    Gupta et al. 2015, arXiv 1502.02551. In training the mean over draws is ``x`` itself wherever it is not clipped, so
    that small updates are not lost; in eval mode, and in storage, codes are the nearest. The scale is set by
    calibration and not learned. Draws are a function of the step's key and the element's place, in the batch of
    all ranks.
    """

    scale: Tensor
    key: Tensor

    def __init__(self, *, spec: QuantSpec, granularity: Granularity = PerTensor()) -> None:  # noqa: B008 - frozen
        super().__init__(spec=spec, granularity=granularity)
        self.register_buffer("scale", torch.ones(self.state_shape))
        self.register_buffer("key", torch.zeros((), dtype=torch.int64), persistent=False)

    def begin_step_(self, *, progress: float, key: int) -> None:
        self.key.fill_(key)

    def fake_quantize(self, x: Tensor) -> Tensor:
        scale = self.spread(self.scale, x)
        if not self.training:
            return fake_quantize(x, scale, self.code_low, self.code_high)
        first = 0 if self.spec.is_weight else place_in_batch(x)
        uniform = keyed_uniform(self.key, tuple(x.shape), first=first)
        return stochastic_fake_quantize(x, scale, self.code_low, self.code_high, uniform)

    def quantize(self, x: Tensor) -> QTensor:
        return self.affine_tensor(x, self.scale)

    @torch.no_grad()
    def calibrate_(self, observed: Observed) -> None:
        self.choose_sign_(observed)
        self.scale.copy_(symmetric_scale(observed.low, observed.high, self.code_low, self.code_high))
        self.initialized.fill_(True)

    @torch.no_grad()
    def rescale_(self, factor: Tensor) -> dict[nn.Parameter, Tensor]:
        self.scale.mul_(factor)
        return {}

    def step(self) -> Tensor:
        return self.scale

    def stored_state(self) -> Mapping[str, NumberPart]:
        return float_parts(scale=self.scale)
