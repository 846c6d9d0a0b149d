"""Priors on images of any content: neighboring pixels are alike, values are not extreme.

These are the priors of DeepInversion (Yin et al. 2020, arXiv 1912.08795, eq. 2: total variation and l2 norm), here as
means, so that their weights do not depend on the size of images and batch.
"""

import torch
from torch import Tensor


def total_variation(images: Tensor) -> Tensor:
    """Mean squared difference of pixels (N, C, H, W) to the next ones right, below and on both diagonals; 0-dim."""
    differences = (
        images[..., :, 1:] - images[..., :, :-1],
        images[..., 1:, :] - images[..., :-1, :],
        images[..., 1:, 1:] - images[..., :-1, :-1],
        images[..., 1:, :-1] - images[..., :-1, 1:],
    )
    return torch.stack([difference.square().mean() for difference in differences]).mean()


def squared_norm(images: Tensor) -> Tensor:
    """Mean square of the normalized values, 0-dim."""
    return images.square().mean()
