"""The modules that replace quantizers while rounding is learned."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import final

import torch
from torch import Tensor, nn

from qtrain.convert.layers import quant_layers
from qtrain.nn import QuantLayer
from qtrain.ptq.rounding.base import Candidates
from qtrain.quantizers.base import Quantizer
from qtrain.quantizers.hooks import ScalesOutput

GAMMA, ZETA = -0.1, 1.1
"""The sigmoid is stretched to ``(GAMMA, ZETA)`` and cut to [0, 1], so that 0 and 1 are reached (eq. 23)."""


def rectified_sigmoid(variable: Tensor) -> Tensor:
    """``h(V) = clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1)`` (Nagel et al. 2020, arXiv 2004.10568, eq. 23)."""
    return (variable.sigmoid() * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def inverse_rectified_sigmoid(share: Tensor) -> Tensor:
    """The ``V`` with ``h(V) = share``, for ``share`` in [0, 1]."""
    return ((share - GAMMA) / (ZETA - GAMMA)).logit()


def undecided(share: Tensor, beta: float) -> Tensor:
    """``1 - |2h - 1|^beta`` (eq. 24): 0 where ``h`` is 0 or 1, 1 where it is a half; flatter for a larger beta."""
    return 1 - (2 * share - 1).abs() ** beta


def annealed(progress: float, *, start: float, end: float, warmup: float) -> float | None:
    """Beta at ``progress`` (0 to 1): linear from ``start`` to ``end``; ``None`` (no regularizer) during ``warmup``.

    With a high beta most variables follow only the reconstruction; as beta falls, they are driven to 0 and 1 (§3.2).
    """
    return None if progress < warmup else start + (end - start) * (progress - warmup) / (1 - warmup)


@final
class SoftWeight(nn.Module):
    """Replaces a weight quantizer by ``down + h(V) (up - down)``; with the initial ``V`` this is the weight itself."""

    enabled = True

    def __init__(self, chosen: Candidates) -> None:
        super().__init__()
        self.chosen = chosen
        self.down, self.gap = chosen.down.float(), (chosen.up - chosen.down).float()
        self.variable = nn.Parameter(inverse_rectified_sigmoid((chosen.steps - chosen.steps.floor()).float()))

    def share(self) -> Tensor:
        """``h(V)`` of the elements for which there is a choice, (n,)."""
        return rectified_sigmoid(self.variable[self.chosen.free])

    def forward(self, weight: Tensor) -> Tensor:
        return (self.down + rectified_sigmoid(self.variable) * self.gap).to(weight.dtype)

    @torch.no_grad()
    def settled(self) -> Tensor:
        """The final values: ``up`` where ``h(V)`` is at least a half, otherwise ``down``."""
        chosen = self.chosen
        up = rectified_sigmoid(self.variable) >= 0.5
        return torch.where(chosen.free, torch.where(up, chosen.up, chosen.down), chosen.nearest)


def mixed(exact: Tensor, quantized: Tensor, *, drop: float, seed: int) -> Tensor:
    """``exact`` with probability ``drop`` for each value, otherwise ``quantized``; draws are a function of ``seed``."""
    draws = torch.rand(exact.shape, generator=torch.Generator(exact.device).manual_seed(seed), device=exact.device)
    return torch.where(draws < drop, exact, quantized)


@final
class Dropped(nn.Module):
    """Replaces an input quantizer ``Q``: each value is ``x`` with probability ``drop``, otherwise ``Q(x)``.

    Wei et al. 2022, QDrop, arXiv 2203.05740, eq. 9. Draws are a function of ``seed``, which changes at each step.
    """

    enabled = True

    def __init__(self, quantizer: Quantizer, *, drop: float) -> None:
        super().__init__()
        self.quantizer, self.drop, self.seed = quantizer, drop, 0

    def forward(self, x: Tensor) -> Tensor:
        return mixed(x, self.quantizer(x), drop=self.drop, seed=self.seed)


@contextmanager
def standing_in(choices: Sequence[Candidates], softs: Sequence[SoftWeight]) -> Iterator[None]:
    """Inside, soft weights replace the layers' weight quantizers."""
    quantizers = [chosen.layer.weight_quantizer for chosen in choices]
    try:
        for chosen, soft in zip(choices, softs, strict=True):
            setattr(chosen.layer, "weight_quantizer", soft)  # noqa: B010 - no quantizer to the type checker
        yield
    finally:
        for chosen, quantizer in zip(choices, quantizers, strict=True):
            chosen.layer.weight_quantizer = quantizer


@contextmanager
def dropping(part: nn.Module, drop: float) -> Iterator[list[Dropped]]:
    """Inside, :class:`Dropped` replaces the input quantizers of ``part``; yields these modules, none if ``drop`` is 0.

    A quantizer that also has to scale the layer's output is not replaced.
    """
    found: list[tuple[QuantLayer, Quantizer, Dropped]] = []
    for layer in quant_layers(part).values():
        quantizer = layer.input_quantizer
        if drop > 0 and quantizer is not None and not isinstance(quantizer, ScalesOutput):
            found.append((layer, quantizer, Dropped(quantizer, drop=drop)))
    try:
        for layer, _, dropped in found:
            setattr(layer, "input_quantizer", dropped)  # noqa: B010 - no quantizer to the type checker
        yield [dropped for _, _, dropped in found]
    finally:
        for layer, quantizer, _ in found:
            layer.input_quantizer = quantizer


def input_parameters(part: nn.Module, *, besides: Collection[nn.Module] = ()) -> list[nn.Parameter]:
    """The learned parameters of the input quantizers of ``part``, each once, but not of the modules ``besides``.

    Layers and sums that read one tensor may share its quantizer.
    """
    layers = quant_layers(part).values()
    quantizers = [layer.input_quantizer for layer in layers if not _is_one_of(layer, besides)]
    kept = (quantizer for quantizer in quantizers if quantizer is not None and not _is_one_of(quantizer, besides))
    return list(dict.fromkeys(p for quantizer in kept for p in quantizer.parameters() if p.requires_grad))


def _is_one_of(module: nn.Module, modules: Collection[nn.Module]) -> bool:
    return any(module is other for other in modules)
