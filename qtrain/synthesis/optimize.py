"""The loop that optimizes images: it starts from noise, and Adam lowers an objective, within the pixel range.

Methods differ in the objective and the augmentation.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qtrain.spec import DataInfo
from qtrain.synthesis.augment import StepAugmentation
from qtrain.synthesis.base import from_pixels, pixel_range
from qtrain.synthesis.init_noise import white_noise
from qtrain.synthesis.model_outputs import FrozenModels
from qtrain.utils.checks import check_range


@dataclass(frozen=True, kw_only=True)
class ImageOptimizer:
    """``steps`` of Adam (b1, b2 = 0.5, 0.9, as DeepInversion) at rate ``lr``, which falls to zero along half a cosine.

    ``lr`` is in units of the normalized values. After each step the values are clamped between black and white.
    """

    steps: int
    lr: float

    def __post_init__(self) -> None:
        check_range("ImageOptimizer", "[1, inf)", steps=self.steps)
        check_range("ImageOptimizer", "(0, inf)", lr=self.lr)

    def __call__(
        self,
        start: Tensor,
        objective: Callable[[Tensor], Tensor],
        augmentation: StepAugmentation,
        info: DataInfo,
        *,
        seed: int,
        number: int,
    ) -> Tensor:
        """Images (N, C, H, W), normalized, from ``start`` to where ``objective`` of their augmentation is low."""
        low, high = pixel_range(start, info)
        images = start.clamp(low, high).requires_grad_()
        optimizer = torch.optim.Adam([images], lr=self.lr, betas=(0.5, 0.9))
        for step in range(self.steps):
            optimizer.param_groups[0]["lr"] = self.lr * 0.5 * (1 + math.cos(math.pi * step / self.steps))
            loss = objective(augmentation(images, low, seed=seed, number=number, step=step))
            (images.grad,) = torch.autograd.grad(loss, images)
            optimizer.step()
            with torch.no_grad():
                torch.maximum(torch.minimum(images, high, out=images), low, out=images)
        if not bool(images.isfinite().all()):  # bytes would make black images of them
            raise ValueError("synthesis: the images are not finite; lower lr, or the weights of the objective")
        return images.detach()


@torch.no_grad()
def image_metrics(
    frozen: FrozenModels,
    info: DataInfo,
    augmentation: StepAugmentation,
    *,
    pixels: Tensor,
    labels: Tensor,
    seed: int,
    number: int,
) -> dict[str, float]:
    """How good a batch is: means over the models.

    ``statistics``: the distance of :class:`StatisticsMatch` for the final bytes ``pixels``, shifted and flipped by
    draws that no step has used. ``noise_statistics``: the same for white noise, clamped to the pixel range.
    ``as_labeled``: the share of whole images that the model classifies as labeled.
    """
    images = from_pixels(pixels, info, labels.device, frozen.images_format)
    noise = white_noise(info, batch_size=len(images), number=number, seed=seed, device=labels.device)
    noise = noise.contiguous(memory_format=frozen.images_format)
    low, high = pixel_range(images, info)
    uncropped = replace(augmentation, smallest_crop=1.0)

    def distance(x: Tensor) -> Tensor:
        outputs = frozen(uncropped(x, low, seed=seed, number=number, step=-1))
        return torch.stack([output.statistics for output in outputs]).mean()

    with torch.compiler.set_stance("force_eager"):
        hits = [(output.logits.argmax(dim=1) == labels).float().mean() for output in frozen(images)]
        return {
            "statistics": float(distance(images)),
            "noise_statistics": float(distance(noise.clamp(low, high))),
            "as_labeled": float(torch.stack(hits).mean()),
        }
