"""PACT: the level at which activations are clipped is trained with the weights."""

from collections.abc import Mapping, Set
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from qtrain.functional.affine import fake_quantize, symmetric_scale
from qtrain.functional.learned_step import SMALLEST_SCALE
from qtrain.functional.ste import clip_ste, straight_through, with_penalty
from qtrain.quantizers.base import Quantizer, Served, float_parts, narrow_range
from qtrain.spec import Observed, PerTensor, QuantSpec
from qtrain.storage.base import NumberPart, QTensor


@final
class PACT(Quantizer):
    """``x^ = round(clip(x, 0, a) (2^b - 1) / a) a / (2^b - 1)``, ``a`` learned (Choi et al. 2018, arXiv 1805.06085).

    Inputs only. The gradient passes inside the clip; that of ``a`` is 1 for each clipped element, plus ``decay a`` in
    training: the paper's L2 regularizer, ``decay / 2 a^2`` in the loss. Where calibration saw negative values (a first
    layer, which the paper leaves unquantized) the clip is ``[-a, a]`` and codes are symmetric. ``init``: where ``a``
    starts; ``None`` is the observed range, for weights that are trained already. The paper starts training at a fixed
    value well above the activations, 8 or 10.
    """

    serves: ClassVar[Set[Served]] = frozenset({"input"})

    level: nn.Parameter
    penalty_share = 1.0

    def __init__(self, *, spec: QuantSpec, decay: float = 2e-4, init: float | None = None) -> None:
        if not decay >= 0:
            raise ValueError(f"PACT: decay must be at least 0, got {decay}; 0 leaves the clipping level unregularized")
        if init is not None and not init > 0:
            raise ValueError(f"PACT: init must be above 0, got {init}; give null to start from the observed range")
        super().__init__(spec=spec, granularity=PerTensor(), codes=narrow_range)
        self.decay = decay
        self.init = init
        self.level = nn.Parameter(torch.ones(()))

    def clip_level(self) -> Tensor:
        """The level in use: the parameter's magnitude, never zero; 0-dim."""
        return self.level.abs().clamp(min=SMALLEST_SCALE)

    def fake_quantize(self, x: Tensor) -> Tensor:
        level = self.clip_level()
        value = fake_quantize(x.detach(), (level / self.code_high).detach(), self.code_low, self.code_high)
        clipped = clip_ste(x, level, self.code_low / self.code_high)
        result = straight_through(value, clipped.to(x.dtype))
        if not self.training:
            return result
        return with_penalty(result, self.penalty_share * self.decay / 2 * level.square())

    def quantize(self, x: Tensor) -> QTensor:
        return self.affine_tensor(x, self.clip_level() / self.code_high)

    @torch.no_grad()
    def calibrate_(self, observed: Observed) -> None:
        self.choose_sign_(observed)
        if self.init is None:
            step = symmetric_scale(observed.low, observed.high, self.code_low, self.code_high)
            self.level.copy_(step * self.code_high)
        else:
            self.level.fill_(self.init)
        self.initialized.fill_(True)

    @torch.no_grad()
    def rescale_(self, factor: Tensor) -> dict[nn.Parameter, Tensor]:
        self.level.mul_(factor)
        return {self.level: 1 / factor}

    def stored_state(self) -> Mapping[str, NumberPart]:
        return float_parts(level=self.level)
