"""How a generator is told which classes to show."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qtrain.functional.random import permutation


class Mixture(NamedTuple):
    """The classes of each image, (N, k) int64, all different, and their shares, (N, k) float32, descending, sum 1.

    The first class of an image is its label.
    """

    classes: Tensor
    shares: Tensor

    def probabilities(self, num_classes: int) -> Tensor:
        """The shares as a target for all classes, (N, ``num_classes``)."""
        empty = torch.zeros(len(self.classes), num_classes, device=self.shares.device)
        return empty.scatter(1, self.classes, self.shares)


class Embedding(nn.Module, ABC):
    """Turns the classes of an image and ``noise_size`` normal numbers into a code of ``latent`` numbers.

    Its parameters are trained with the generator's. Subclasses are final.
    """

    noise_size: int
    latent: int

    @abstractmethod
    def forward(self, mixture: Mixture, noise: Tensor) -> Tensor:
        """The codes (N, latent) of ``mixture`` with ``noise`` (N, noise_size)."""


class Conditioning(ABC):
    """Which classes the images of a generator show, and their embedding. Subclasses are final.

    Attributes are only the options: they identify a saved generator.
    """

    @abstractmethod
    def embedding(self, models: Sequence[nn.Module], num_classes: int) -> Embedding:
        """A new embedding, from torch's random state; ``ValueError``, with the remedy, if the models do not fit."""

    @abstractmethod
    def mix(self, labels: Tensor, num_classes: int, generator: torch.Generator) -> Mixture:
        """The classes for the images of a batch with ``labels`` (N,); all draws are from ``generator``."""


def labels_in_turn(*, number: int, count: int, num_classes: int, seed: int, stream: int) -> Tensor:
    """Labels of batch ``number`` of ``count`` images, (N,) int64.

    They are a part of a sequence that has all classes in a random order, then in another one, and so on. So each class
    comes equally often, also where a batch has fewer images than there are classes.
    """
    places = range(number * count, (number + 1) * count)
    rounds = range(places[0] // num_classes, places[-1] // num_classes + 1)
    order = torch.cat([permutation(seed=seed, epoch=turn, n=num_classes, stream=stream) for turn in rounds])
    first = places[0] - rounds[0] * num_classes
    return order[first : first + count]
