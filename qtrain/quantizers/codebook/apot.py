"""Additive powers of two (APoT): levels that are sums of few powers of two, dense near zero and not only there."""

from typing import final

import torch
from torch import Tensor, nn

from qtrain.functional.learned_step import SMALLEST_SCALE
from qtrain.functional.levels import sums_of_powers
from qtrain.quantizers.codebook.levels import LevelQuantizer
from qtrain.spec import Granularity, Observed, PerTensor, QuantSpec

EPSILON = 1e-5
SMALLEST_WEIGHT_VARIANCE = 1e-20
"""A weight with a smaller variance counts as constant. The gradient of the root, infinite at zero, is then 0."""


def centered(weight: Tensor) -> tuple[Tensor, Tensor]:
    """``w - mean(w)`` and ``std(w) + epsilon``, over the whole tensor, float32 (§2.3); the second is 0-dim."""
    values = weight.float()
    if not values.numel():
        return values, values.new_ones(())
    values = values - values.mean()
    return values, values.square().mean().clamp(min=SMALLEST_WEIGHT_VARIANCE).sqrt() + EPSILON


@final
class APoT(LevelQuantizer):
    """``x^ = a nearest(clip(x / a, -1, 1))``: levels are sums of powers of two, ``a`` is learned (arXiv 1909.13144).

    Levels: :func:`qtrain.functional.levels.sums_of_powers`, base width 2 (eq. 5 and 6), of ``b - 1`` bits and a sign,
    or of ``b`` bits where nothing is negative. Gradients: eq. 8. ``a`` starts at the least squared error for weights
    and at the observed range for inputs.

    ``normalize`` (weights): ``(w - mean) / (std + 1e-5)`` is rounded (§2.3), and the layer multiplies by the result and
    stores it, instead of the weight; a batch norm behind the layer absorbs the change of scale. The gradient passes
    through mean and std. ``rescale`` multiplies the result by ``std + 1e-5`` again (it is part of the stored scale),
    for layers without such a batch norm and for trained networks, whose running statistics know the old scale. The mean
    is not added back in either case.
    """

    widths = range(2, 9)

    def __init__(
        self,
        *,
        spec: QuantSpec,
        granularity: Granularity = PerTensor(),  # noqa: B008 - frozen
        normalize: bool = True,
        rescale: bool = False,
    ) -> None:
        if rescale and not normalize:
            raise ValueError("APoT: rescale undoes normalize, which is false; leave rescale out")
        super().__init__(spec=spec, granularity=granularity, magnitudes=sums_of_powers)
        self.normalize = normalize and spec.is_weight
        self.rescale = rescale

    def normalized(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The tensor that is rounded, and the unit of ``a`` where that is not 1."""
        if not self.normalize:
            return x.float(), None
        values, unit = centered(x)
        return (values, unit) if self.rescale else (values / unit, None)

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values, unit = self.normalized(x)
        clip = self.scale.abs().clamp(min=SMALLEST_SCALE)
        return values, clip if unit is None else clip * unit

    @torch.no_grad()
    def calibrate_(self, observed: Observed) -> None:
        self.choose_sign_(observed)
        if observed.tensor is None:
            self.scale.copy_(self.reach(observed))
        else:
            values, unit = self.normalized(observed.tensor)
            self.scale.copy_(self.fitted(values if unit is None else values / unit))
        self.initialized.fill_(True)

    @torch.no_grad()
    def rescale_(self, factor: Tensor) -> dict[nn.Parameter, Tensor]:
        assert isinstance(self.scale, nn.Parameter)
        self.scale.mul_(factor)
        return {self.scale: 1 / factor}
