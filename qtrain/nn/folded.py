"""Weights that are rounded as if the batch norm behind their convolution were merged into them, while it trains on."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

LEAST = 1e-6
"""Least magnitude of a factor: a channel that batch norm switches off has 0, and weights are divided by the factor."""

NEAR_ZERO = 1e-2
"""A smaller ``gamma`` is one that starts at 0, or was driven there; it is usual to start at 1."""


@final
class FoldedWeight(nn.Module):
    """``Q(g W) / g`` in place of ``Q(W)``, with ``g = gamma / sqrt(running_var + eps)`` of each output channel.

    The quantizer sees the weight that is deployed, merged with the batch norm. In eval mode the two layers compute what
    the merged layer computes. In training the norm uses the batch's statistics and the rounded weight the running ones,
    so that rounding does not jitter with each batch. This is the correction of Krishnamoorthi 2018 (arXiv 1806.08342,
    §3.2.2), which has the running statistics in the weight and their ratio to the batch's on the output: dividing the
    weight divides the output. The gradient reaches ``gamma`` as it does there. ``norm`` is read, not owned, so its
    state keeps its one name in the model. With ``merged`` the layer's weight is ``g W`` already, as it is stored.

    ``fixed`` (O,) are factors that take the place of ``g`` where they are above 0. They are for channels with ``g``
    near 0: a step in units of ``g W`` would clip the whole channel once ``g`` grows.
    """

    fixed: Tensor | None

    def __init__(self, *, norm: _BatchNorm, fixed: Tensor | None = None, merged: bool = False) -> None:
        super().__init__()
        if norm.running_var is None:
            raise ValueError(
                "FoldedWeight: the norm keeps no running statistics; track them, or set quantize.fold=none"
            )
        self._norm = (norm,)  # in a tuple, which hides it from the state dict and not from a deep copy
        self._held: Tensor | None = None
        self.register_buffer("fixed", fixed, persistent=False)
        self.merged = merged

    @property
    def norm(self) -> _BatchNorm:
        return self._norm[0]

    def forward(self, weight: Tensor) -> Tensor:
        """``g W``: what is quantized, (O, I, ...)."""
        return weight if self.merged else weight * self.factor(weight)

    def restore(self, weight: Tensor) -> Tensor:
        """``W / g``: what is convolved."""
        return weight / self.factor(weight)

    def hold(self, held: bool) -> None:
        """Keep the factor as it is now while the norm's statistics change, or let it follow them again."""
        self._held = self.factor(self._norm[0].running_var).detach() if held else None  # type: ignore[arg-type]

    def follow(self, replaced: Mapping[_BatchNorm, _BatchNorm]) -> None:
        """Follow the norm that replaced the present one, if ``replaced`` holds one."""
        self._norm = (replaced.get(self._norm[0], self._norm[0]),)

    def factor(self, weight: Tensor) -> Tensor:
        """``g`` as it multiplies ``weight`` (O, I, ...): (O, 1, ...)."""
        if self._held is not None:
            return self._held.to(weight.dtype).reshape(-1, *(1 for _ in weight.shape[1:]))
        (norm,) = self._norm
        assert norm.running_var is not None
        factor = (norm.running_var + norm.eps).rsqrt()
        if norm.weight is not None:
            factor = factor * norm.weight
        factor = torch.where(factor.abs() < LEAST, LEAST, factor)
        if self.fixed is not None:
            factor = torch.where(self.fixed > 0, self.fixed, factor)
        return factor.to(weight.dtype).reshape(-1, *(1 for _ in weight.shape[1:]))


@torch.no_grad()
def fixed_factors(norm: _BatchNorm) -> Tensor | None:
    """Factors (O,) for the channels whose ``gamma`` is near 0 now, 0 for others; ``None`` where there are no such.

    It is the mean magnitude of the other channels' factors, so that one step for all channels suits these too.
    """
    assert norm.running_var is not None
    if norm.weight is None or not bool((near := norm.weight.abs() < NEAR_ZERO).any()):
        return None
    factor = (norm.weight * (norm.running_var + norm.eps).rsqrt()).abs()
    mean = factor[~near].mean() if not bool(near.all()) else torch.ones_like(factor[0])
    return torch.where(near, mean, 0.0)


@contextmanager
def holding_factors(model: nn.Module) -> Iterator[None]:
    """Inside, no factor of ``model`` follows its norm; for use while statistics are reset and estimated anew."""
    folded = [module for module in model.modules() if isinstance(module, FoldedWeight)]
    for module in folded:
        module.hold(True)
    try:
        yield
    finally:
        for module in folded:
            module.hold(False)
