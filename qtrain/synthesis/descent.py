"""The loop that all optimised images come from: noise, driven down an objective by Adam, within the pixel range.

Floor 3. What differs from method to method is the objective and the views.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qtrain.functional import random
from qtrain.spec import DataInfo
from qtrain.synthesis.base import from_bytes, pixel_range
from qtrain.synthesis.judge import Judge
from qtrain.synthesis.views import Views


@dataclass(frozen=True, kw_only=True)
class Descent:
    """``steps`` of Adam (b1, b2 = 0.5, 0.9, as DeepInversion) at rate ``lr``, which falls to zero along half a cosine.

    ``lr`` is in units of the normalised values. After each step values are clamped to those of black and white.
    """

    steps: int
    lr: float

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"Descent: steps must be at least 1, got {self.steps}")
        if self.lr <= 0:
            raise ValueError(f"Descent: lr must be above 0, got {self.lr}")

    def __call__(
        self,
        start: Tensor,
        objective: Callable[[Tensor], Tensor],
        views: Views,
        info: DataInfo,
        *,
        seed: int,
        number: int,
    ) -> Tensor:
        """Images (N, C, H, W), normalised, that begin as ``start`` and at which ``objective`` of their views is low."""
        low, high = pixel_range(start, info)
        images = start.clamp(low, high).requires_grad_()
        optimizer = torch.optim.Adam([images], lr=self.lr, betas=(0.5, 0.9))
        for step in range(self.steps):
            optimizer.param_groups[0]["lr"] = self.lr * 0.5 * (1 + math.cos(math.pi * step / self.steps))
            loss = objective(views(images, low, seed=seed, number=number, step=step))
            (images.grad,) = torch.autograd.grad(loss, images)
            optimizer.step()
            with torch.no_grad():
                torch.maximum(torch.minimum(images, high, out=images), low, out=images)
        return images.detach()


def balanced_labels(info: DataInfo, *, batch_size: int, number: int, device: torch.device, run: int = 1) -> Tensor:
    """Labels (N,) int64 of batch ``number``: the classes in turn, over all batches, so that each comes equally often.

    ``run`` images in a row have the same. Raises ``ValueError`` for one class only: no label then tells one image from
    another.
    """
    if info.num_classes < 2:
        raise ValueError(
            f"synthesis: {info.name} has {info.num_classes} class, and images are told apart by their classes; "
            "give data with at least two"
        )
    index = torch.arange(number * batch_size, (number + 1) * batch_size, device=device)
    return index // run % info.num_classes


def gaussian_noise(info: DataInfo, *, batch_size: int, number: int, seed: int, device: torch.device) -> Tensor:
    """Standard normal start (N, C, H, W), channels last: a function of the seed and each image's own number."""
    shape = (batch_size, info.in_channels, info.image_size, info.image_size)
    index = torch.arange(number * batch_size, (number + 1) * batch_size)
    uniform = random.uniform(seed=seed, epoch=0, index=index, stream=random.NOISE, count=math.prod(shape[1:]))
    # Multiples of 2^-24 from the middle of their interval, so that 0 is no infinity. On the CPU, whatever the device:
    # the inverse differs between libraries in the last place.
    normal = torch.special.ndtri(uniform.double() + 2.0**-25).float().reshape(shape)
    return normal.to(device).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def figures_of(
    judge: Judge, info: DataInfo, views: Views, *, start: Tensor, pixels: Tensor, labels: Tensor, seed: int, number: int
) -> dict[str, float]:
    """What a batch reached, means over the models.

    ``statistics``: the distance of :class:`StatisticsMatch` on the bytes ``pixels`` that are kept, shifted and flipped
    by draws that no step has seen; ``noise_statistics``: the same of ``start``, clamped to the pixel range;
    ``as_labelled``: the share of whole images that the model gives their label.
    """
    low, high = pixel_range(start, info)
    images = from_bytes(pixels, info, start.device)
    uncropped = replace(views, smallest_crop=1.0)

    def distance(x: Tensor) -> Tensor:
        answers = judge(uncropped(x, low, seed=seed, number=number, step=-1))
        return torch.stack([answer.statistics for answer in answers]).mean()

    hits = [(answer.logits.argmax(dim=1) == labels).float().mean() for answer in judge(images)]
    return {
        "statistics": float(distance(images)),
        "noise_statistics": float(distance(start.clamp(low, high))),
        "as_labelled": float(torch.stack(hits).mean()),
    }
