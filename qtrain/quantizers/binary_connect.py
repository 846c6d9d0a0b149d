"""BinaryConnect: weights that are -1 or 1 in the forward, and real in the optimizer."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from qtrain.functional.binary import sign
from qtrain.functional.random import keyed_uniform
from qtrain.functional.ste import straight_through
from qtrain.quantizers.binary import Binary
from qtrain.spec import Observed, PerTensor, QuantSpec


def probability_of_one(w: Tensor) -> Tensor:
    """The hard sigmoid ``clip((w + 1) / 2, 0, 1)`` (BinaryConnect, arXiv 1511.00363, eq. 2-3)."""
    return ((w.float() + 1) / 2).clamp(0, 1)


@final
class BinaryConnect(Binary):
    """``w_b = sign(w)`` (Courbariaux et al. 2015, arXiv 1511.00363, eq. 1); weights only.

    With ``stochastic``, in training ``w_b`` is 1 with probability ``clip((w + 1) / 2, 0, 1)``, else -1 (eq. 2), whose
    mean is ``clip(w, -1, 1)``; in eval mode it is the sign. The gradient of ``w_b`` goes to ``w`` as it is, and after
    each step ``w`` is clipped to [-1, 1] (algorithm 1, §2.4).
    """

    serves = frozenset({"weight"})

    key: Tensor

    def __init__(self, *, spec: QuantSpec, stochastic: bool = False) -> None:
        super().__init__(spec=spec, granularity=PerTensor())
        self.stochastic = stochastic
        self.register_buffer("key", torch.zeros((), dtype=torch.int64))

    def begin_step_(self, *, progress: float, key: int) -> None:
        self.key.fill_(key)

    def fake_quantize(self, x: Tensor) -> Tensor:
        if self.stochastic and self.training:
            drawn = probability_of_one(x) > keyed_uniform(self.key, tuple(x.shape))
            values = torch.where(drawn, 1.0, -1.0)
        else:
            values = sign(x)
        return straight_through(values.to(x.dtype), x)

    def factor(self, x: Tensor) -> None:
        return None

    def project(self, weight: Tensor) -> Tensor:
        return weight.clamp(-1, 1)

    def calibrate_(self, observed: Observed) -> None:
        self.initialized.fill_(True)

    def storage_bits(self) -> int:
        return 0
