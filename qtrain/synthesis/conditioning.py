"""How a generator is told what to show."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qtrain.functional.random import permutation


class Mixture(NamedTuple):
    """The classes of each image, (N, k) int64, all different, and their shares, (N, k) float32, falling, of sum 1.

    The first class of an image is its label.
    """

    classes: Tensor
    shares: Tensor

    def probabilities(self, num_classes: int) -> Tensor:
        """The shares as a target for all classes, (N, ``num_classes``)."""
        empty = torch.zeros(len(self.classes), num_classes, device=self.shares.device)
        return empty.scatter(1, self.classes, self.shares)


class Embedding(nn.Module, ABC):
    """Turns what an image is to show, and ``noise_size`` normal numbers, into a code of ``latent``.

    Its parameters are trained with the generator's. Subclasses are final.
    """

    noise_size: int
    latent: int

    @abstractmethod
    def forward(self, mixture: Mixture, noise: Tensor) -> Tensor:
        """The codes (N, latent) of ``mixture`` with ``noise`` (N, noise_size)."""


class Conditioning(ABC):
    """What images a generator is asked for, and the embedding of that. Subclasses are final.

    Attributes are the options and nothing else: they tell whether a saved generator is the one that is asked for.
    """

    @abstractmethod
    def embedding(self, models: Sequence[nn.Module], num_classes: int) -> Embedding:
        """Fresh, from torch's random state; ``ValueError``, with the remedy, where the models do not serve."""

    @abstractmethod
    def mix(self, labels: Tensor, num_classes: int, generator: torch.Generator) -> Mixture:
        """What the images of a batch are to show whose labels are ``labels`` (N,), all draws from ``generator``."""


def labels_in_turn(*, number: int, count: int, num_classes: int, seed: int, stream: int) -> Tensor:
    """Labels of batch ``number`` of ``count``: (N,) int64, a part of a sequence of all classes in ever new orders.

    So over whole rounds each class comes equally often, also where a batch is smaller than their number.
    """
    places = range(number * count, (number + 1) * count)
    rounds = range(places[0] // num_classes, places[-1] // num_classes + 1)
    order = torch.cat([permutation(seed=seed, epoch=turn, n=num_classes, stream=stream) for turn in rounds])
    first = places[0] - rounds[0] * num_classes
    return order[first : first + count]


def check_at_least(owner: str, least: float, **options: float) -> None:
    """Raise ``ValueError`` for an option that is below ``least``."""
    for name, value in options.items():
        if not value >= least:
            raise ValueError(f"{owner}: {name} must be at least {least}, got {value}")
