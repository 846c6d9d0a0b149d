"""What models say of images: their logits, how far the images' statistics are from those of training, their features.

The part of each step that takes all the time, and so the part that is compiled.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from qtrain.synthesis.statistics import StatisticsMatch


class Answer(NamedTuple):
    """One model's ``logits`` (N, K), distance ``statistics`` (0-dim), and ``features`` (N, D) before its last layer."""

    logits: Tensor
    statistics: Tensor
    features: Tensor


@final
class Judge:
    """``judge(x)`` is one :class:`Answer` for each of ``models``, with gradients to the images ``x`` (N, C, H, W).

    The judge has copies of the models, with its hooks in them; those that it was made from are left as they are.
    ``compile`` pays where many batches are made: one compilation serves them all.

    Raises ``ValueError`` where a model has no statistics (:func:`statistics_layers`) or no linear layer.
    """

    def __init__(self, models: Sequence[nn.Module], *, compile: bool) -> None:
        self._of = tuple(models)
        self._parts = [_Part(copy.deepcopy(model).to(memory_format=torch.channels_last)) for model in models]
        self._look = torch.compile(self._answers, fullgraph=True) if compile else self._answers

    @staticmethod
    def of(models: Sequence[nn.Module], earlier: Judge | None, *, compile: bool) -> Judge:
        """``earlier``, where it was made from these very models, so that nothing is compiled twice; or a new one."""
        before = () if earlier is None else earlier._of
        if earlier is not None and len(models) == len(before) and all(map(operator.is_, models, before)):
            return earlier
        return Judge(models, compile=compile)

    def __call__(self, images: Tensor) -> list[Answer]:
        return self._look(images)

    def _answers(self, images: Tensor) -> list[Answer]:
        return [part.answer(images) for part in self._parts]


class _Part:
    """One model with its taps."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._match = StatisticsMatch(model)
        self._features: Tensor | None = None
        last_linear(model).register_forward_pre_hook(self._keep)

    def answer(self, images: Tensor) -> Answer:
        logits = self._model(images)
        assert self._features is not None
        return Answer(logits, self._match.loss(), self._features)

    def _keep(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        self._features = args[0].flatten(1)


def last_linear(model: nn.Module) -> nn.Linear:
    """The classifier: the last linear layer in the order of definition."""
    found = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    if not found:
        raise ValueError(f"Judge: {type(model).__name__} has no linear layer, and features are what its last is given")
    return found[-1]
