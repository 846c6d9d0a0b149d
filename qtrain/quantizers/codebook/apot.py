"""Additive powers of two (APoT): levels that are sums of few powers of two, dense near zero and not only there."""

import logging
from functools import cache
from typing import Literal, final

import torch
from torch import Tensor, nn

from qtrain.functional.learned_step import SMALLEST_SCALE
from qtrain.functional.levels import sums_of_powers
from qtrain.quantizers.codebook.levels import LevelQuantizer
from qtrain.spec import Granularity, Observed, PerTensor, QuantSpec

log = logging.getLogger(__name__)

EPSILON = 1e-5
DEVIATIONS = 5.0
"""So far from what drawn weights have is a weight that was trained."""

SMALLEST_WEIGHT_VARIANCE = 1e-20
"""A weight with a smaller variance counts as constant. The gradient of the root, infinite at zero, is then 0."""


def centered(weight: Tensor) -> tuple[Tensor, Tensor]:
    """``w - mean(w)`` and ``std(w) + epsilon``, over the whole tensor, float32 (§2.3); the second is 0-dim."""
    values = weight.float()
    if not values.numel():
        return values, values.new_ones(())
    values = values - values.mean()
    return values, values.square().mean().clamp(min=SMALLEST_WEIGHT_VARIANCE).sqrt() + EPSILON


def looks_trained(weight: Tensor) -> bool:
    """Whether ``weight`` (O, ...) is unlike one whose elements were drawn alike and independently, as at a start.

    For drawn elements the mean, the energies of output and of input channels and the fourth moment differ from those of
    equal normals by few of their own deviations; training moves them by many. True where one of them is more than 5
    deviations off. A distribution with lighter tails than a normal counts as drawn.
    """
    w = weight.detach().double()
    energy = w.square().mean()
    if w.numel() < 2 or not bool(energy > 0):
        return False
    tails = w.pow(4).mean() / energy.square()
    off = [w.mean().abs() * (w.numel() / energy).sqrt(), (tails - 3) * (w.numel() / 24) ** 0.5]
    for axis in range(min(w.ndim, 2)):
        rows = w.transpose(0, axis).flatten(1) if w.ndim > 1 else w.reshape(-1, 1)
        if rows.shape[0] > 1 and rows.shape[1] > 1:
            spread = (rows.square().mean(dim=1) / energy - 1).square() * rows.shape[1] / (tails - 1).clamp(min=0.1)
            off.append((spread.sum() / (len(rows) - 1) - 1) * ((len(rows) - 1) / 2) ** 0.5)
    return bool(torch.stack(off).max() > DEVIATIONS)


@cache
def _say_once(form: str) -> None:
    log.log(logging.WARNING if form in _WARNED else logging.INFO, "APoT: %s", form)


PLAIN = "the weights look trained and are rounded as they are: without the mean that normalizing takes they are others"
CENTERED = "the weights look newly drawn: their mean is taken off, as in the paper, and their scale is kept"
CHANGED = (
    "normalize=true takes the mean, and without rescale the scale, from weights that look trained, so that the network "
    "computes something else until it is trained again; normalize=auto keeps them"
)
_WARNED = (CHANGED,)


@final
class APoT(LevelQuantizer):
    """``x^ = a nearest(clip(x / a, -1, 1))``: levels are sums of powers of two, ``a`` is learned (arXiv 1909.13144).

    Levels: :func:`qtrain.functional.levels.sums_of_powers`, base width 2 (eq. 5 and 6), of ``b - 1`` bits and a sign,
    or of ``b`` bits where nothing is negative. Gradients: eq. 8. ``a`` starts at the least squared error for weights
    and at the observed range for inputs.

    ``normalize=true`` (weights): ``(w - mean) / (std + 1e-5)`` is rounded (§2.3), and the layer multiplies by the
    result and stores it, instead of the weight; a batch norm behind the layer absorbs the change of scale once it is
    trained. The gradient passes through mean and std. ``rescale`` multiplies the result by ``std + 1e-5`` again (it is
    part of the stored scale), for layers without such a batch norm. The mean is not added back in either case, which
    changes what a trained network computes. So ``normalize=auto`` chooses at calibration: weights that look trained
    (:func:`looks_trained`) are rounded as they are, others as by ``normalize`` with ``rescale``.
    """

    widths = range(2, 9)
    normalizes: Tensor

    def __init__(
        self,
        *,
        spec: QuantSpec,
        granularity: Granularity = PerTensor(),  # noqa: B008 - frozen
        normalize: bool | Literal["auto"] = "auto",
        rescale: bool = False,
    ) -> None:
        if normalize not in (True, False, "auto"):
            raise ValueError(f"APoT: normalize must be true, false or auto, got {normalize!r}")
        if rescale and normalize is not True:
            said = str(normalize).lower()
            raise ValueError(f"APoT: rescale belongs to normalize=true, got normalize={said}; leave rescale out")
        super().__init__(spec=spec, granularity=granularity, magnitudes=sums_of_powers)
        self.normalize = normalize if spec.is_weight else False
        self.rescale = rescale or normalize == "auto"
        self.register_buffer("normalizes", torch.tensor(self.normalize is True))

    def normalized(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The tensor that is rounded, and the unit of ``a`` where that is not 1."""
        if self.normalize is False:
            return x.float(), None
        values, unit = centered(x)
        if self.normalize == "auto":  # both forms, so that no graph branches on a value
            values, unit = torch.where(self.normalizes, values, x.float()), torch.where(self.normalizes, unit, 1.0)
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
            if self.normalize is not False:
                trained = looks_trained(observed.tensor)
                self.normalizes.fill_(self.normalize is True or not trained)
                if trained or self.normalize == "auto":
                    _say_once(CHANGED if self.normalize is True else PLAIN if trained else CENTERED)
            values, unit = self.normalized(observed.tensor)
            self.scale.copy_(self.fitted(values if unit is None else values / unit))
        self.initialized.fill_(True)

    @torch.no_grad()
    def rescale_(self, factor: Tensor) -> dict[nn.Parameter, Tensor]:
        assert isinstance(self.scale, nn.Parameter)
        self.scale.mul_(factor)
        return {self.scale: 1 / factor}
