"""Qimera: images of several classes at once, which lie near the boundaries between the classes."""

from collections.abc import Sequence
from typing import Literal, final, get_args

import torch
from torch import Tensor, nn

from qtrain.synthesis.conditioning import Conditioning, Embedding, Mixture
from qtrain.utils.checks import check_range

Start = Literal["classifier", "random"]


@final
class Superposition(Embedding):
    """``code = M(sum_k share_k e_k + z)``: embeddings of classes superposed, noise added, and a learned mapping M.

    ``table`` (K, D) are the initial embeddings; they are scaled to a mean square of one, as the noise has. The linear M
    (D to ``latent``) is Qimera's disentanglement mapping (§3.3).
    """

    def __init__(self, *, table: Tensor, latent: int) -> None:
        super().__init__()
        table = table.detach().float()
        scale = table.square().mean().sqrt().clamp(min=torch.finfo(torch.float32).tiny)
        self.noise_size, self.latent = table.shape[1], latent
        self.classes = nn.Parameter(table / scale)
        self.mapping = nn.Linear(self.noise_size, latent)

    def forward(self, mixture: Mixture, noise: Tensor) -> Tensor:
        superposed = (mixture.shares[..., None] * self.classes[mixture.classes]).sum(dim=1)
        code: Tensor = self.mapping(superposed + noise)
        return code


@final
class Qimera(Conditioning):
    """A part of the images shows ``classes`` classes at once (Choi et al. 2021, arXiv 2111.02625, §3.2).

    The first ``superposed`` share of a batch shows several classes with shares ``softmax(N(0, 1))``. The generator
    learns to make images to which the model gives these shares as probabilities ("boundary supporting samples"). The
    label is the class with the largest share. The other images show one class. ``start`` gives the initial embeddings
    of classes: ``classifier``, the rows of the first model's last layer (§3.3), or ``random``, as the authors do for
    CIFAR-10.
    """

    def __init__(
        self, *, latent: int = 64, superposed: float = 0.4, classes: int = 2, start: Start = "classifier"
    ) -> None:
        check_range("Qimera", "[1, inf)", latent=latent)
        check_range("Qimera", "[2, inf)", classes=classes)
        check_range("Qimera", "[0, 1]", superposed=superposed, hint="a share of the images")
        if start not in get_args(Start):
            raise ValueError(f"Qimera: start must be 'classifier' or 'random', got {start!r}")
        self.latent, self.superposed, self.classes, self.start = latent, superposed, classes, start

    def embedding(self, models: Sequence[nn.Module], num_classes: int) -> Embedding:
        if num_classes < self.classes:
            raise ValueError(
                f"Qimera: superposes {self.classes} classes, but the model has {num_classes}; set classes={num_classes}"
            )
        random = self.start == "random"
        table = torch.randn(num_classes, self.latent) if random else classifier_rows(models[0], num_classes)
        return Superposition(table=table.cpu(), latent=self.latent)

    def mix(self, labels: Tensor, num_classes: int, generator: torch.Generator) -> Mixture:
        mixed = round(self.superposed * len(labels))
        # A random order of the classes other than the label, as distances to it.
        other = torch.rand(len(labels), num_classes - 1, generator=generator).argsort(dim=1) + 1
        others = (labels[:, None] + other[:, : self.classes - 1]) % num_classes
        shares = torch.randn(len(labels), self.classes, generator=generator).softmax(dim=1).sort(descending=True).values
        alone = torch.zeros(self.classes)
        alone[0] = 1.0
        shares[mixed:] = alone
        return Mixture(torch.cat([labels[:, None], others], dim=1), shares)


def classifier_rows(model: nn.Module, num_classes: int) -> Tensor:
    """The weight (K, D) of the last linear layer, or 1x1 convolution, of ``model`` with ``num_classes`` outputs."""
    found = None
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and module.weight.shape[0] == num_classes:
            found = module.weight if module.weight[0, 0].numel() == 1 else found
    if found is None:
        raise ValueError(
            f"Qimera: {type(model).__name__} has no linear layer with {num_classes} outputs to start from; "
            "set synthesis.conditioning.start=random"
        )
    return found.detach().flatten(1)
