"""What the quantizers with one bit share: a sign, stored in one plane, and perhaps a factor."""

from abc import ABC, abstractmethod
from typing import final

import torch
from torch import Tensor

from qtrain.functional.affine import require_finite
from qtrain.functional.binary import plane_range
from qtrain.quantizers.base import Quantizer
from qtrain.spec import Granularity, Observed, QuantSpec
from qtrain.storage.base import QTensor
from qtrain.storage.planes import BitPlanes


class Binary(Quantizer, ABC):
    """Base of ``x^ = alpha sign(x - threshold)``, where the sign of zero is 1, so that zero is not one of the values.

    The ``threshold``, of inputs only, is 0 as in the papers, whose networks have no ReLU before a sign. With ``center``
    calibration sets it to the mean of inputs that are never negative: their signs would all be 1. The layer's output
    then lacks a constant, for which the following batch normalization compensates.
    """

    widths = range(1, 2)
    keeps_zero = False

    threshold: Tensor | None

    def __init__(self, *, spec: QuantSpec, granularity: Granularity, center: bool = False) -> None:
        super().__init__(spec=spec, granularity=granularity, codes=plane_range)
        self.center = center
        self.register_buffer("threshold", None if spec.is_weight else torch.zeros(self.state_shape))

    @abstractmethod
    def factor(self, x: Tensor) -> Tensor | None:
        """``alpha`` for ``x``, float32 of the state shape; ``None`` where it is 1 by definition."""

    def centered(self, x: Tensor) -> Tensor:
        """The argument of the sign, float32: ``x - threshold``, unless a method defines another."""
        return x.float() if self.threshold is None else x.float() - self.threshold

    @final
    @torch.no_grad()
    def center_(self, observed: Observed) -> None:
        """Let calibration set the threshold."""
        if self.threshold is not None and self.center:
            self.threshold.copy_(torch.where((observed.low >= 0).all(), observed.mean_abs, 0.0))

    @final
    @torch.no_grad()
    def quantize(self, x: Tensor) -> QTensor:
        require_finite(x)
        alpha = self.factor(x)
        return BitPlanes(
            codes=(self.centered(x) >= 0).to(torch.int32).unsqueeze(0),
            bits=1,
            low=0,
            high=1,
            dtype=x.dtype,
            scale=None if alpha is None else alpha.clone().unsqueeze(0),
            granularity=self.granularity,
        )
