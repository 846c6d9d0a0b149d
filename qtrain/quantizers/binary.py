"""What the quantizers with one bit share: a sign, stored in one plane, and perhaps a factor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import final

import torch
from torch import Tensor

from qtrain.functional.affine import require_finite
from qtrain.functional.binary import plane_range
from qtrain.quantizers.base import Quantizer
from qtrain.spec import Granularity, QuantSpec
from qtrain.storage.base import QTensor
from qtrain.storage.planes import BitPlanes


class Binary(Quantizer, ABC):
    """Base of ``x^ = alpha sign(x)``, where the sign of zero is 1, so that zero is none of the values."""

    widths = range(1, 2)
    keeps_zero = False

    def __init__(self, *, spec: QuantSpec, granularity: Granularity) -> None:
        super().__init__(spec=spec, granularity=granularity, codes=plane_range)

    @abstractmethod
    def factor(self, x: Tensor) -> Tensor | None:
        """``alpha`` for ``x``, float32 of the state shape; ``None`` where it is 1 by definition."""

    @final
    @torch.no_grad()
    def quantize(self, x: Tensor) -> QTensor:
        require_finite(x)
        alpha = self.factor(x)
        return BitPlanes(
            codes=(x >= 0).to(torch.int32).unsqueeze(0),
            bits=1,
            low=0,
            high=1,
            dtype=x.dtype,
            scale=None if alpha is None else alpha.clone().unsqueeze(0),
            granularity=self.granularity,
        )
