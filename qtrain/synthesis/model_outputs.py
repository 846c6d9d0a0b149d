"""What trained models compute from images: logits, features, and the distance of batch norm's statistics.

This takes nearly all the time of a step, so it is the part that is compiled.
"""

import copy
import operator
from collections.abc import Sequence
from typing import NamedTuple, final

import torch
from torch import Tensor, nn

from qtrain.models.memory_format import format_for
from qtrain.synthesis.statistics import StatisticsMatch
from qtrain.utils.calls import see_input


class ModelOutput(NamedTuple):
    """One model's ``logits`` (N, K), its ``features`` (N, D) before the last layer, and ``statistics`` (0-dim).

    ``statistics`` is the distance of :class:`StatisticsMatch`: how far the batch is from the training data.
    """

    logits: Tensor
    statistics: Tensor
    features: Tensor


@final
class FrozenModels:
    """``frozen(x)`` is a :class:`ModelOutput` for each of ``models``, with gradients to the images ``x`` (N, C, H, W).

    It hooks into copies of the models and leaves the given ones as they are. ``images_format`` is the memory format for
    the images. ``compile`` pays where many batches are made, since it compiles once for all of them.

    Raises ``ValueError`` where a model has no statistics (:func:`statistics_layers`) or no linear layer.
    """

    def __init__(self, models: Sequence[nn.Module], *, compile: bool) -> None:
        self._models = tuple(models)
        self.images_format = format_for(models)
        self._parts = [_Part(copy.deepcopy(model)) for model in models]
        self._forward = torch.compile(self._outputs, fullgraph=True) if compile else self._outputs

    @staticmethod
    def of(models: Sequence[nn.Module], earlier: "FrozenModels | None", *, compile: bool) -> "FrozenModels":
        """``earlier`` if it was made from these same models, so that nothing is compiled twice; otherwise a new one."""
        before = () if earlier is None else earlier._models
        if earlier is not None and len(models) == len(before) and all(map(operator.is_, models, before)):
            return earlier
        return FrozenModels(models, compile=compile)

    def __call__(self, images: Tensor) -> list[ModelOutput]:
        return self._forward(images)

    def _outputs(self, images: Tensor) -> list[ModelOutput]:
        return [part.output(images) for part in self._parts]


class _Part:
    """One model with its taps."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._match = StatisticsMatch(model)
        self._features: Tensor | None = None
        see_input(last_linear(model), self._keep)

    def output(self, images: Tensor) -> ModelOutput:
        logits = self._model(images)
        assert self._features is not None
        return ModelOutput(logits, self._match.loss(), self._features)

    def _keep(self, features: Tensor) -> None:
        self._features = features.flatten(1)


def last_linear(model: nn.Module) -> nn.Linear:
    """The classifier of ``model``: its last linear layer, in the order of definition."""
    found = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    if not found:
        raise ValueError(f"FrozenModels: {type(model).__name__} has no linear layer, whose input would be the features")
    return found[-1]
