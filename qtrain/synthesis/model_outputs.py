"""What trained models compute from images: logits, features, and the distance of batch norm's statistics.

This takes nearly all the time of a step, so it is the part that is compiled.
"""

import copy
import operator
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, final

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from qtrain.models.ends import ends_of
from qtrain.models.memory_format import format_for
from qtrain.spec import DataInfo
from qtrain.synthesis.statistics import StatisticsMatch
from qtrain.utils.calls import see_input


class ModelOutput(NamedTuple):
    """One model's ``logits`` (N, K), ``features`` (N, D) before its last layers, and ``statistics`` (0-dim).

    ``statistics`` is the distance of :class:`StatisticsMatch`: how far the batch is from the training data.
    """

    logits: Tensor
    statistics: Tensor
    features: Tensor


@final
class FrozenModels:
    """``frozen(x)`` is a :class:`ModelOutput` for each of ``models``, with gradients to the images ``x`` (N, C, H, W).

    It hooks into copies of the models and leaves the given ones as they are. ``example`` are images of the right size.
    ``images_format`` is the memory format for the images. ``compile`` pays where many batches are made, since it
    compiles once for all of them.

    Raises ``ValueError`` where a model has no statistics (:func:`statistics_layers`) or no layer that gives the logits.
    """

    def __init__(self, models: Sequence[nn.Module], *, example: Tensor, compile: bool) -> None:
        self._models = tuple(models)
        self.images_format = format_for(models)
        self._parts = [_Part(copy.deepcopy(model), example) for model in models]
        self._forward = torch.compile(self._outputs, fullgraph=True) if compile else self._outputs

    @staticmethod
    def of(
        models: Sequence[nn.Module],
        earlier: "FrozenModels | None",
        *,
        info: DataInfo,
        device: torch.device,
        compile: bool,
    ) -> "FrozenModels":
        """``earlier`` if it was made from these same models, so that nothing is compiled twice; otherwise a new one."""
        before = () if earlier is None else earlier._models
        if earlier is not None and len(models) == len(before) and all(map(operator.is_, models, before)):
            return earlier
        example = torch.zeros(1, info.in_channels, info.image_size, info.image_size, device=device)
        return FrozenModels(models, example=example, compile=compile)

    def __call__(self, images: Tensor) -> list[ModelOutput]:
        return self._forward(images)

    def _outputs(self, images: Tensor) -> list[ModelOutput]:
        return [part.output(images) for part in self._parts]


class _Part:
    """One model with its taps."""

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        self._model = model
        self._match = StatisticsMatch(model)
        heads = last_layers(model, example)
        self._features: list[Tensor | None] = [None] * len(heads)
        for place, head in enumerate(heads):
            see_input(head, partial(self._keep, place))

    def output(self, images: Tensor) -> ModelOutput:
        logits = self._model(images)
        features = [found for found in self._features if found is not None]
        return ModelOutput(logits, self._match.loss(), torch.cat(features, dim=1))

    def _keep(self, place: int, features: Tensor) -> None:
        self._features[place] = features.flatten(1)


def last_layers(model: nn.Module, example: Tensor) -> list[nn.Module]:
    """The classifiers of ``model``, in the order of definition: linear layers and convolutions that give its logits.

    There is no other such layer between. A model with a second head, for a distilled token for instance, has several.
    Raises ``ValueError`` where none is found.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear | _ConvNd)}
    _, last = ends_of(model, layers, example)
    if not last:
        raise ValueError(
            f"FrozenModels: {type(model).__name__} has no linear layer or convolution whose output becomes the logits, "
            "and so no features before it"
        )
    return [layer for name, layer in layers.items() if name in last]
