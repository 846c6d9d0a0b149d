"""Quantized weights that serve several batches: what gradient accumulation need not compute again."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import final

import torch
from torch import Tensor, nn

from qtrain.nn import QuantWeighted
from qtrain.nn.base import quantized_weight
from qtrain.nn.folded import FoldedWeight
from qtrain.quantizers.base import Quantizer


@final
class HeldWeights:
    """Lets the quantized weights of ``model``, computed once, serve all batches between two optimizer steps.

    Batches before the last differentiate as far as the quantized weights, where their gradients are added up. The last
    one's backward takes the sum on through the quantizers. This is the chain rule with the same terms in another order:
    a quantizer's backward is linear in the incoming gradient. So the quantizers run once a step, forward and backward,
    and what they add of their own (a penalty, a moving average) counts once a step. Every parameter gets its gradient
    in the last backward, in which processes exchange gradients.

    A weight that follows the statistics of its batch norm (:class:`FoldedWeight`) changes with each batch, and is
    quantized for each.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = [
            layer
            for layer in model.modules()
            if isinstance(layer, QuantWeighted)
            and layer.weight_quantizer is not None
            and not isinstance(getattr(layer, "weight_transform", None), FoldedWeight)
        ]
        self._whole: list[Tensor] | None = None
        self._leaves: list[Tensor] = []

    @property
    def quantizers(self) -> set[Quantizer]:
        """The quantizers that run once a step."""
        return {quantizer for layer in self._layers if (quantizer := layer.weight_quantizer) is not None}

    @contextmanager
    def batch(self, *, last: bool) -> Iterator[None]:
        """Inside, a forward of the model takes the held weights; ``last`` says that an optimizer step follows."""
        if self._whole is None:
            self._whole = [_own(quantized_weight(layer), layer) for layer in self._layers]
            self._leaves = [weight.detach().requires_grad_(weight.requires_grad) for weight in self._whole]
        used = self._leaves
        if last:
            for weight, leaf in zip(self._whole, self._leaves, strict=True):
                _add_gradient_of(leaf, to=weight)
            used, self._whole, self._leaves = self._whole, None, []
        self._lend(used)
        try:
            yield
        finally:
            self._lend([None] * len(self._layers))

    def _lend(self, weights: Sequence[Tensor | None]) -> None:
        for layer, weight in zip(self._layers, weights, strict=True):
            layer.held_weight = weight


def _own(weight: Tensor, layer: QuantWeighted) -> Tensor:
    """``weight``; a copy where a disabled quantizer gave the parameter itself."""
    return weight.clone() if weight is layer.weight else weight


def _add_gradient_of(leaf: Tensor, *, to: Tensor) -> None:
    """Add to the gradient of ``to``, when it comes, what has gathered at ``leaf``."""
    if leaf.grad is not None and to.requires_grad:
        gathered = leaf.grad
        to.register_hook(lambda gradient: torch.add(gradient, gathered))
