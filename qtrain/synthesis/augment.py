"""Crops, shifts and flips in each step of the loop that makes images, so that no single pixel matters much.

DeepInversion (Yin et al. 2020, arXiv 1912.08795) shifts and flips; IntraQ (Zhong et al. 2022, arXiv
2111.09136) crops a part and enlarges it to the full size ("local object reinforcement"), so that a batch has objects at
different scales and places. Everything is differentiable, and each draw is a function of (seed, batch number, step).

A shifted image gets black edges. Most small models are trained with crops from padded images, so their running
statistics are those of images with black edges, which whole real images do not have.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qtrain.functional import random
from qtrain.utils.checks import check_range


@dataclass(frozen=True, kw_only=True)
class StepAugmentation:
    """How each step augments the images, with separate draws for each image.

    ``shift``: by at most so many whole pixels up or down, left or right. ``flip``: mirrored left to right with
    probability one half. ``smallest_crop``: in a share ``crop_steps`` of the steps, a random window with an area
    between this share and the whole is enlarged to the full size instead of a shift; with 1 this never happens.
    """

    shift: int = 0
    flip: bool = False
    smallest_crop: float = 1.0
    crop_steps: float = 0.5

    def __post_init__(self) -> None:
        owner = type(self).__name__
        check_range(owner, "[0, inf)", shift=self.shift, hint="in pixels")
        check_range(owner, "(0, 1]", smallest_crop=self.smallest_crop, hint="a share of the area")
        check_range(owner, "[0, 1]", crop_steps=self.crop_steps, hint="a share of the steps")

    def __call__(self, images: Tensor, black: Tensor, *, seed: int, number: int, step: int) -> Tensor:
        """``images`` (N, C, H, W) of batch ``number``, augmented for step ``step``; same shape.

        ``black`` (1, C, 1, 1) is the value of black pixels.
        """
        if not self.shift and not self.flip and self.smallest_crop == 1:
            return images
        index = torch.arange(len(images) + 1)  # the last row is for the step as a whole
        key = random.seed_of(seed, number)
        draws = random.uniform(seed=key, epoch=step, index=index, stream=random.VIEW, count=4)
        each = draws[:-1].to(images.device)
        mirrored = (each[:, 0] < 0.5) & self.flip
        size = torch.tensor(images.shape[:1:-1], device=images.device)  # width, height
        if self.smallest_crop < 1 and float(draws[-1, 0]) < self.crop_steps:
            side = (self.smallest_crop + (1 - self.smallest_crop) * each[:, 1]).sqrt()
            # The outermost samples are at most at the middle of the outermost pixels, so none is beyond the edge.
            center = (2 * each[:, 2:] - 1) * (1 - side)[:, None] * (1 - 1 / size)
        else:
            side = torch.ones_like(each[:, 1])
            pixels = (each[:, 2:] * (2 * self.shift + 1)).floor() - self.shift
            center = 2 * pixels / size
        return window(images, side, center, mirrored, black)


def window(images: Tensor, side: Tensor, center: Tensor, mirrored: Tensor, black: Tensor) -> Tensor:
    """A square window of each image (N, C, H, W), enlarged to the full size; bilinear, ``black`` beyond the edges.

    An image reaches from -1 to 1 in both directions; ``side`` (N,) is half the window's side there, ``center`` (N, 2)
    its middle, right and down; ``mirrored`` (N,) turns it left to right. Side 1 and center 0 is the image itself.
    """
    zero = torch.zeros_like(side)
    across = torch.stack([torch.where(mirrored, -side, side), zero, center[:, 0]], dim=1)
    down = torch.stack([zero, side, center[:, 1]], dim=1)
    grid = F.affine_grid(torch.stack([across, down], dim=1), list(images.shape), align_corners=False)
    return F.grid_sample(images - black, grid, padding_mode="zeros", align_corners=False) + black
