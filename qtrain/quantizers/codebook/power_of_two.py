"""Powers of two: a product with such a weight is a shift."""

from typing import final

import torch
from torch import Tensor, nn

from qtrain.functional.learned_step import SMALLEST_SCALE
from qtrain.functional.levels import nearest_of_powers, powers_of_two
from qtrain.quantizers.codebook.levels import LevelQuantizer
from qtrain.spec import Granularity, Observed, PerTensor, QuantSpec


@final
class PowerOfTwo(LevelQuantizer):
    """Zero and ``+-2^-k`` times a scale, nearest in the linear domain (eq. 3 of APoT, arXiv 1909.13144).

    ``b`` signed bits name the powers ``1, 1/2, ..., 2^-(2^(b-1)-2)``, zero and the signs; ``b`` unsigned bits those
    down to ``2^-(2^b-2)``. ``scale`` is ``learned``, with APoT's gradient (its eq. 8), from a start of least squared
    error for weights and from the observed range for inputs; ``calibrated``, the same start kept; or ``power_of_two``,
    INQ's rule (arXiv 1702.03044, eq. 2): ``2^floor(log2(4 max|x| / 3))``, kept, so that every value is itself a power
    of two. INQ spends a whole bit on zero and has half as many powers at the same width.
    """

    widths = range(2, 8)  # 8 unsigned bits would reach 2^-254, below what float32 holds

    def __init__(
        self,
        *,
        spec: QuantSpec,
        granularity: Granularity = PerTensor(),  # noqa: B008 - frozen
        scale: str = "learned",
    ) -> None:
        if scale not in ("learned", "calibrated", "power_of_two"):
            raise ValueError(f"PowerOfTwo: scale must be 'learned', 'calibrated' or 'power_of_two', got {scale!r}")
        learned = scale == "learned"
        super().__init__(
            spec=spec, granularity=granularity, magnitudes=powers_of_two, learned=learned, nearest=nearest_of_powers
        )
        self.rule = scale

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor]:
        learned = isinstance(self.scale, nn.Parameter)
        return x.float(), self.scale.abs().clamp(min=SMALLEST_SCALE) if learned else self.scale

    @torch.no_grad()
    def calibrate_(self, observed: Observed) -> None:
        self.choose_sign_(observed)
        if self.rule == "power_of_two":
            self.scale.copy_((4 / 3 * self.reach(observed)).log2().floor().exp2())
        elif observed.tensor is not None:
            self.scale.copy_(self.fitted(observed.tensor.float()))
        else:
            self.scale.copy_(self.reach(observed))
        self.initialized.fill_(True)

    @torch.no_grad()
    def rescale_(self, factor: Tensor) -> dict[nn.Parameter, Tensor]:
        if self.rule == "power_of_two":
            factor = factor.log2().round().exp2()
        self.scale.mul_(factor)
        return {self.scale: 1 / factor} if isinstance(self.scale, nn.Parameter) else {}
