"""BinaryConnect: weights that are -1 or 1 in the forward, and real in the optimizer."""

import math
from collections.abc import Mapping
from typing import Literal, final

import torch
from torch import Tensor

from qtrain.functional.indicator import above, sign
from qtrain.functional.random import keyed_uniform
from qtrain.functional.ste import straight_through
from qtrain.quantizers.binary.binary import Binary
from qtrain.spec import Observed, PerTensor, QuantSpec
from qtrain.storage.base import NumberPart


def probability_of_one(w: Tensor) -> Tensor:
    """The hard sigmoid ``clip((w + 1) / 2, 0, 1)`` (BinaryConnect, arXiv 1511.00363, eq. 2-3)."""
    return ((w.float() + 1) / 2).clamp(0, 1)


def glorot_bound(shape: tuple[int, ...]) -> float:
    """``sqrt(1.5 / (fan_in + fan_out))`` for a weight (O, I, ...)."""
    positions = math.prod(shape[2:])
    fans = (shape[0] + (shape[1] if len(shape) > 1 else 1)) * positions
    return math.sqrt(1.5 / max(fans, 1))


@final
class BinaryConnect(Binary):
    """``w_b = sign(w)`` (Courbariaux et al. 2015, arXiv 1511.00363, eq. 1); weights only.

    With ``stochastic``, in training ``w_b`` is 1 with probability ``clip((w + 1) / 2, 0, 1)``, else -1 (eq. 2), whose
    mean is ``clip(w, -1, 1)``; in eval mode it is the sign. The gradient of ``w_b`` goes to ``w`` as it is, and after
    each step ``w`` is clipped to [-1, 1] (algorithm 1, §2.4).

    ``bound: glorot`` has ``-H`` and ``H`` everywhere in place of -1 and 1, ``H`` of :func:`glorot_bound`: an option of
    the authors' program. With the sign alone it only changes the layer's scale. With ``stochastic`` it matters for
    pretrained weights: they are small against 1, so that both signs are almost equally likely, but not small against
    ``H``.
    """

    serves = frozenset({"weight"})

    key: Tensor

    def __init__(self, *, spec: QuantSpec, stochastic: bool = False, bound: Literal["one", "glorot"] = "one") -> None:
        if bound not in ("one", "glorot"):
            raise ValueError(f"BinaryConnect: bound must be 'one' or 'glorot', got {bound!r}")
        super().__init__(spec=spec, granularity=PerTensor())
        self.stochastic = stochastic
        self.bound = glorot_bound(spec.shape) if bound == "glorot" else None
        self.register_buffer("key", torch.zeros((), dtype=torch.int64))

    def begin_step_(self, *, progress: float, key: int) -> None:
        self.key.fill_(key)

    def fake_quantize(self, x: Tensor) -> Tensor:
        if self.stochastic and self.training:
            signs = 2 * above(probability_of_one(x / self.limit()), keyed_uniform(self.key, tuple(x.shape))) - 1
        else:
            signs = sign(x)
        return straight_through((signs * self.limit()).to(x.dtype), x)

    def limit(self) -> float:
        """The magnitude of the weights."""
        return 1.0 if self.bound is None else self.bound

    def factor(self, x: Tensor) -> Tensor | None:
        return None if self.bound is None else torch.tensor(self.bound, device=x.device)

    def project(self, weight: Tensor) -> Tensor:
        return weight.clamp(-self.limit(), self.limit())

    def calibrate_(self, observed: Observed) -> None:
        self.initialized.fill_(True)

    def stored_state(self) -> Mapping[str, NumberPart]:
        return {}
