"""What all ways of rounding share: the two codes next to each weight, and writing the chosen one.

A way of rounding writes its choice into the weights, as values on their quantizer's grid. Nearest rounding then gives
the chosen codes, so cost, export and checkpoints need not know of it.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from qtrain.convert.layers import quant_layers
from qtrain.nn import Operand, QuantEmbedding, QuantWeighted
from qtrain.nn.project import replace_weight_
from qtrain.quantizers.hooks import EvenSteps
from qtrain.quantizers.wrappers.wrapper import innermost
from qtrain.utils.eval_mode import evaluating
from qtrain.utils.sharing import shared_tensors, why_shared

log = logging.getLogger(__name__)


class Rounding(ABC):
    """Base of all ways of rounding; subclasses are final, and their options are their constructor's.

    ``needs_images`` is false for those that look only at the weights.
    """

    needs_images: ClassVar[bool] = True

    @abstractmethod
    def __call__(self, student: nn.Module, images: Sequence[Tensor], *, seed: int) -> None:
        """Round the weights of ``student``, calibrated, in place.

        ``images`` are batches (N, C, H, W) on the device of ``student``. Random choices are a function of ``seed`` and
        the place in the model. Layers that cannot be rounded in this way keep nearest rounding and are logged with the
        reason.
        """


@final
@dataclass(frozen=True, eq=False)
class Candidates:
    """The values to which the weight of one layer may be rounded; each has the weight's shape (O, I, ...).

    ``steps`` is ``w / s``, ``down`` and ``up`` are the quantizer's values below and above ``w``, ``nearest`` is the one
    that it takes by itself. Where ``down`` equals ``up`` there is no choice: the range ends there, or the quantizer has
    one fixed value for this element.
    """

    layer: QuantWeighted
    steps: Tensor
    down: Tensor
    up: Tensor
    nearest: Tensor

    @property
    def free(self) -> Tensor:
        """Whether there is a choice, for each element: bool."""
        return self.up > self.down


class CannotRound(Exception):
    """Why a layer stays at nearest rounding."""


@torch.no_grad()
def candidates(layer: QuantWeighted) -> Candidates:
    """The candidates of a layer with a calibrated weight quantizer. Raises :class:`CannotRound`.

    Both values come from the quantizer itself, so that a wrapper around the even steps, a mask for instance, takes
    part.
    """
    quantizer = layer.weight_quantizer
    assert quantizer is not None
    if isinstance(layer, QuantEmbedding):
        raise CannotRound("it is looked up and not multiplied, and nearest is the best for a value by itself")
    if getattr(layer, "weight_transform", None) is not None:
        raise CannotRound("its weight is standardized, or merged with batch norm, before it is multiplied")
    core = innermost(quantizer)
    if not isinstance(core, EvenSteps):
        raise CannotRound(f"{type(core).__name__} has no even steps; lsq, lsq_plus and affine have")
    weight = layer.effective_weight().detach()
    step = core.spread(core.step(), weight)
    steps = weight.float() / step
    with evaluating(quantizer):
        nearest = quantizer(weight)
        down, up = (quantizer((code * step).to(weight.dtype)) for code in (steps.floor(), steps.floor() + 1))
        odd = (torch.arange(weight.numel(), device=weight.device) % 2 == 1).reshape(weight.shape)
        mixtures = [torch.where(odd, down, up), torch.where(odd, up, down)]
        kept = all(torch.equal(quantizer(values), values) for values in mixtures)
    if not kept or not bool(((nearest == down) | (nearest == up)).all()):
        raise CannotRound(f"{type(quantizer).__name__} changes values that are whole steps")
    return Candidates(layer, steps, down, up, nearest)


def write_(chosen: Candidates, values: Tensor) -> None:
    """Put ``values``, each ``down`` or ``up`` of ``chosen``, into the layer's weight."""
    assert bool(((values == chosen.down) | (values == chosen.up)).all())
    written = replace_weight_(chosen.layer, lambda _: values)
    assert written


def all_candidates(student: nn.Module) -> dict[str, Candidates]:
    """Candidates of every layer of ``student`` with a quantized weight, by qualified name.

    A layer that has none is logged with the reason. Raises ``ValueError`` where a weight quantizer is not calibrated.
    """
    found = {}
    shared = shared_tensors(student)
    for name, layer in quant_layers(student).items():
        if isinstance(layer, Operand) or layer.weight_quantizer is None:
            continue
        if not bool(layer.weight_quantizer.initialized):
            raise ValueError(f"rounding: the weight quantizer of layer {name!r} is not calibrated; calibrate first")
        try:
            if (others := why_shared(shared, name, "weight")) is not None:
                raise CannotRound(others)
            found[name] = candidates(layer)
        except CannotRound as reason:
            log.warning("left at nearest rounding: %s: %s", name, reason)
    return found
