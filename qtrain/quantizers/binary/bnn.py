"""BinaryNet: weights and inputs of -1 and 1, the gradient clipped where the real value lies beyond them."""

from collections.abc import Mapping
from typing import final

from torch import Tensor

from qtrain.functional.ste import sign_ste
from qtrain.quantizers.base import float_parts
from qtrain.quantizers.binary.binary import Binary
from qtrain.spec import Observed, PerTensor, QuantSpec
from qtrain.storage.base import NumberPart


@final
class BNN(Binary):
    """``x_b = sign(x)``, with gradient ``1[|x| <= 1]`` (Courbariaux, Hubara et al. 2016, arXiv 1602.02830, eq. 1, 4).

    For weights and inputs, without any factor: the layer is expected to stand before a batch normalization. After each
    step weights are clipped to [-1, 1] (algorithm 1). ``center``: see :class:`Binary`.
    """

    def __init__(self, *, spec: QuantSpec, center: bool = True) -> None:
        super().__init__(spec=spec, granularity=PerTensor(), center=center)

    def fake_quantize(self, x: Tensor) -> Tensor:
        return sign_ste(self.centered(x)).to(x.dtype)

    def factor(self, x: Tensor) -> None:
        return None

    def project(self, weight: Tensor) -> Tensor:
        return weight.clamp(-1, 1)

    def calibrate_(self, observed: Observed) -> None:
        self.center_(observed)
        self.initialized.fill_(True)

    def stored_state(self) -> Mapping[str, NumberPart]:
        return float_parts(threshold=self.threshold if self.center else None)
