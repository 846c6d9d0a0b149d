"""PSAQ-ViT: images for transformers, which have no batch norm.

For a real image, self-attention gives patches that resemble some patches and differ from others; for noise all patches
are alike. PSAQ-ViT (Li et al. 2022, arXiv 2203.02250) measures this by the differential entropy of the cosine
similarities between patches, and makes images that maximize it in every block:

    - entropy * sum_l H_l(x) + label * CE(f(x), y) + total_variation * TV(x)
"""

import math
from collections.abc import Sequence
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from qtrain.models.memory_format import format_for
from qtrain.spec import DataInfo
from qtrain.synthesis.augment import StepAugmentation
from qtrain.synthesis.base import Made, Synthesis, from_pixels, pixel_range, to_pixels
from qtrain.synthesis.init_noise import balanced_labels, white_noise
from qtrain.synthesis.optimize import ImageOptimizer
from qtrain.synthesis.priors import total_variation
from qtrain.utils.calls import see_input
from qtrain.utils.checks import check_range

FLOOR = 1e-4
"""Added to densities before their logarithm, as the paper's authors do."""


def patch_similarities(tokens: Tensor) -> Tensor:
    """Cosine similarities (N, L * L) of all pairs of ``tokens`` (N, L, D)."""
    unit = F.normalize(tokens, dim=2)
    return (unit @ unit.transpose(1, 2)).flatten(1)


def differential_entropy(values: Tensor, *, bandwidth: float, points: int) -> Tensor:
    """``-integral p log p`` in nats of the density ``p`` of each row of ``values`` (N, S): (N,).

    ``p`` is a kernel density estimate with Gaussians of standard deviation ``bandwidth``. The integral is computed by
    the trapezoidal rule from ``points`` values of ``p``, evenly spaced from the row's lowest to its highest value.
    """
    low, high = values.detach().aminmax(dim=1, keepdim=True)
    places = low + (high - low) * torch.linspace(0, 1, points, device=values.device, dtype=values.dtype)
    # Kernels are recomputed in the backward, since together they would be `points` times as large as the values.
    each = [checkpoint(_density, values, place, bandwidth, use_reentrant=False) for place in places.unbind(1)]
    density = torch.stack(each, dim=1) + FLOOR
    return torch.trapezoid(-density * density.log(), places, dim=1)


def _density(values: Tensor, place: Tensor, bandwidth: float) -> Tensor:
    """The density (N,) of each row of ``values`` (N, S) at its ``place`` (N,)."""
    away = (values - place[:, None]) / bandwidth
    return (-0.5 * away.square()).exp().mean(dim=1) / (bandwidth * math.sqrt(2 * math.pi))


def attention_blocks(model: nn.Module) -> dict[str, Any]:
    """timm's self-attention modules of ``model`` by name; ``ValueError`` if there are none."""
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "num_heads", None), int)
        and isinstance(getattr(module, "qkv", None), nn.Linear)
        and isinstance(getattr(module, "proj", None), nn.Linear)
    }
    if not found:
        raise ValueError(
            f"PatchSimilarity: {type(model).__name__} has no self-attention of timm's kind (qkv, proj), whose patches "
            "are compared; take a ViT or DeiT, or synthesis=bn_statistics for a model with batch norm"
        )
    return found


@final
class PatchTaps:
    """After ``model(x)``, ``entropy()`` is the sum over blocks of the mean entropy of its patches' similarities.

    A block's patches (N, L, D) are the outputs of its attention, averaged over heads, before the projection and without
    class tokens. ``close()``, or leaving a ``with`` block, removes the hooks.
    """

    def __init__(self, model: nn.Module, *, bandwidth: float, points: int) -> None:
        self._bandwidth, self._points = bandwidth, points
        self._prefix = int(getattr(model, "num_prefix_tokens", 0))
        self._seen: dict[str, Tensor] = {}
        self._handles = [self._watch(name, block) for name, block in attention_blocks(model).items()]

    def entropy(self) -> Tensor:
        """The entropy of the last forward, 0-dim, in nats."""
        each = [
            differential_entropy(patch_similarities(patches), bandwidth=self._bandwidth, points=self._points).mean()
            for patches in self._seen.values()
        ]
        return torch.stack(each).sum()

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._seen.clear()

    def __enter__(self) -> "PatchTaps":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _watch(self, name: str, block: Any) -> RemovableHandle:
        def keep(tokens: Tensor) -> None:
            heads = tokens.unflatten(2, (block.num_heads, -1)).mean(dim=2)
            self._seen[name] = heads[:, self._prefix :]

        return see_input(block.proj, keep)


@final
class PatchSimilarity(Synthesis):
    """Batches whose patches differ from one another in all blocks of a transformer; see the module for the objective.

    ``entropy``, ``label`` and ``total_variation`` are weights; ``bandwidth`` (in units of cosine similarity) and
    ``points`` are those of :func:`differential_entropy`; ``steps``, ``lr``, ``shift`` and ``flip`` those of
    :class:`ImageOptimizer` and :class:`StepAugmentation`.
    """

    def __init__(
        self,
        *,
        batch_size: int = 32,
        steps: int = 500,
        lr: float = 0.2,
        entropy: float = 1.0,
        label: float = 1.0,
        total_variation: float = 0.05,
        bandwidth: float = 0.05,
        points: int = 40,
        shift: int = 0,
        flip: bool = True,
    ) -> None:
        owner = type(self).__name__
        check_range(owner, "[1, inf)", batch_size=batch_size)
        check_range(owner, "(0, inf)", bandwidth=bandwidth)
        check_range(owner, "[2, inf)", points=points)
        check_range(owner, "[0, inf)", entropy=entropy, label=label, total_variation=total_variation)
        self.batch_size = batch_size
        self._optimize = ImageOptimizer(steps=steps, lr=lr)
        self._augmentation = StepAugmentation(shift=shift, flip=flip)
        self._entropy, self._label, self._total_variation = entropy, label, total_variation
        self._bandwidth, self._points = bandwidth, points

    def check(self, models: Sequence[nn.Module]) -> None:
        for model in models:
            attention_blocks(model)

    def make(
        self, models: Sequence[nn.Module], info: DataInfo, *, number: int, seed: int, device: torch.device
    ) -> Made:
        labels = balanced_labels(info, batch_size=self.batch_size, number=number, device=device)
        images_format = format_for(models)
        start = white_noise(info, batch_size=self.batch_size, number=number, seed=seed, device=device)
        start = start.contiguous(memory_format=images_format)

        def objective(x: Tensor) -> Tensor:
            told = []
            for logits, entropy in self._ask(models, x):
                told.append(self._label * F.cross_entropy(logits, labels) - self._entropy * entropy)
            return torch.stack(told).mean() + self._total_variation * total_variation(x)

        pixels = to_pixels(self._optimize(start, objective, self._augmentation, info, seed=seed, number=number), info)
        with torch.no_grad():
            low, high = pixel_range(start, info)
            reached = self._ask(models, from_pixels(pixels, info, device, images_format))
            began = self._ask(models, start.clamp(low, high))
            hits = [(logits.argmax(dim=1) == labels).float().mean() for logits, _ in reached]
        metrics = {
            "patch_entropy": float(torch.stack([entropy for _, entropy in reached]).mean()),
            "noise_patch_entropy": float(torch.stack([entropy for _, entropy in began]).mean()),
            "as_labeled": float(torch.stack(hits).mean()),
        }
        return Made(pixels, labels.cpu(), metrics)

    def _ask(self, models: Sequence[nn.Module], x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Logits (N, K) and entropy (0-dim) of each model."""
        answers = []
        for model in models:
            with PatchTaps(model, bandwidth=self._bandwidth, points=self._points) as taps:
                answers.append((model(x), taps.entropy()))
        return answers
