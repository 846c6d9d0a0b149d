"""GDFQ: each image shows one class, whose embedding multiplies the noise."""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn

from qtrain.synthesis.conditioning import Conditioning, Embedding, Mixture
from qtrain.utils.checks import check_range


@final
class ScaledNoise(Embedding):
    """``code = e_y * z``, element by element, with a learned vector ``e_y`` for each class (GDFQ, eq. 2)."""

    def __init__(self, *, num_classes: int, latent: int) -> None:
        super().__init__()
        self.noise_size = self.latent = latent
        self.classes = nn.Embedding(num_classes, latent)

    def forward(self, mixture: Mixture, noise: Tensor) -> Tensor:
        scaled: Tensor = self.classes(mixture.classes[:, 0]) * noise
        return scaled


@final
class GDFQ(Conditioning):
    """Each image shows one class (Xu et al. 2020, arXiv 2003.03603); ``latent`` is the size of noise and code."""

    def __init__(self, *, latent: int = 100) -> None:
        check_range("GDFQ", "[1, inf)", latent=latent)
        self.latent = latent

    def embedding(self, models: Sequence[nn.Module], num_classes: int) -> Embedding:
        return ScaledNoise(num_classes=num_classes, latent=self.latent)

    def mix(self, labels: Tensor, num_classes: int, generator: torch.Generator) -> Mixture:
        return Mixture(labels[:, None], torch.ones(len(labels), 1))
