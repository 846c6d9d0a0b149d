"""Augmentation of whole batches on any device: crop, flip, normalize, mixup, cutmix.

Pure functions; what they need to know of chance comes in as tensors from ``functional.random``, so that
they are the same on every device and can be tested with chosen values.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qtrain.functional import random
from qtrain.functional.layout import arranged


def crop_and_flip(images: Tensor, index: Tensor, top: Tensor, left: Tensor, flip: Tensor) -> Tensor:
    """Shifted and mirrored samples of a dataset, black where the window hangs over the edge.

    ``images`` (D, H, W, C) uint8 is the whole dataset; ``index`` (N,) int64 picks samples; the window of sample n
    starts at row ``top[n]`` and column ``left[n]`` (int64, negative or positive), and is mirrored left to right
    where ``flip[n]``. Equal to padding with zeros and cropping, without the padded copy: one gather. Returns
    (N, H, W, C) uint8.
    """
    height, width = images.shape[1:3]
    rows = top[:, None] + torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device).expand(len(index), width)
    columns = left[:, None] + torch.where(flip[:, None], width - 1 - columns, columns)
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    rows, columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
    # One flat gather of whole pixels: four times as fast on a CPU as indexing with three tensors.
    pixel = ((index[:, None] * height + rows) * width)[:, :, None] + columns[:, None, :]
    window = images.view(-1, images.shape[3]).index_select(0, pixel.flatten()).view(*pixel.shape, -1)
    return window * inside[..., None]


def random_crop_flip(images: Tensor, index: Tensor, *, seed: int, epoch: int, padding: int, flip: bool) -> Tensor:
    """Random crop from images padded by ``padding`` black pixels, mirrored with probability one half.

    The recipe of He et al. 2015 (arXiv:1512.03385, section 4.2). Shapes as in ``crop_and_flip``; the window of a
    sample is a function of (seed, epoch, its number).
    """
    if not padding and not flip:
        return images[index]
    return crop_and_flip(images, index, *random_windows(index, seed=seed, epoch=epoch, padding=padding, flip=flip))


def random_windows(index: Tensor, *, seed: int, epoch: int, padding: int, flip: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Top, left and whether it is mirrored, each (N,), of the window of each sample ``index`` (N,) int64."""
    u = random.uniform(seed=seed, epoch=epoch, index=index, stream=random.CROP, count=3)
    offset = (u[:, :2] * (2 * padding + 1)).long() - padding
    mirrored = (u[:, 2] < 0.5) if flip else torch.zeros_like(index, dtype=torch.bool)
    return offset[:, 0], offset[:, 1], mirrored


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float], *, channels_last: bool) -> Tensor:
    """``(pixel / 255 - mean) / std``: uint8 (N, H, W, C) to float32 (N, C, H, W), in the memory format asked for."""
    # A whole row of pixels at a time: four times as fast on a CPU as an innermost dimension of three channels.
    rows = images.flatten(2)
    scale = torch.tensor([1 / (255 * s) for s in std] * images.shape[2]).to(images.device, non_blocking=True)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)] * images.shape[2])
    values = rows.to(torch.float32).mul_(scale).add_(shift.to(images.device, non_blocking=True))
    x = values.view(images.shape).permute(0, 3, 1, 2)
    return arranged(x, channels_last=channels_last)


class MixPlan(NamedTuple):
    """How the pairs of a batch mix: pixels outside ``box`` keep ``pixel_share`` of themselves, those inside none.

    ``pixel_share`` and ``label_share`` (P,) float32; ``box`` (P, 4) int64: top, bottom, left, right, may be empty.
    """

    pixel_share: Tensor
    label_share: Tensor
    box: Tensor


def plan_mix(pair: Tensor, *, seed: int, epoch: int, mixup: float, cutmix: float, height: int, width: int) -> MixPlan:
    """The mixing of the pairs whose first samples have the numbers ``pair`` (P,) int64, on the CPU.

    mixup (Zhang et al. 2017, arXiv:1710.09412) blends pixels; cutmix (Yun et al. 2019, arXiv:1905.04899) replaces a
    rectangle, and its label share is what the rectangle left after clipping at the edges. ``mixup`` and ``cutmix``
    are the alpha of the share's distribution Beta(alpha, alpha), 0 for off; with both on, each pair tosses a coin.
    Depends on (seed, epoch, pair) and not on the batch around it: ranks that slice a batch between pairs see what
    one rank would.
    """
    from scipy.special import betaincinv  # here, since few runs mix images and scipy is slow to import

    coin, quantile, *center = random.uniform(seed=seed, epoch=epoch, index=pair, stream=random.MIX, count=4).unbind(1)
    cuts = torch.full_like(coin, cutmix > 0, dtype=torch.bool) if not (mixup and cutmix) else coin < 0.5
    alpha = torch.where(cuts, float(cutmix), float(mixup))
    share = torch.from_numpy(betaincinv(alpha.numpy(), alpha.numpy(), quantile.double().numpy())).float()
    edges = []
    for middle, size in zip(center, (height, width), strict=True):
        half = size * (1 - share).sqrt() / 2
        edges += [(middle * size - half).round().clamp(0, size), (middle * size + half).round().clamp(0, size)]
    box = torch.where(cuts[:, None], torch.stack(edges, dim=1), 0.0).long()
    area = (box[:, 1] - box[:, 0]) * (box[:, 3] - box[:, 2])
    return MixPlan(torch.where(cuts, 1.0, share), torch.where(cuts, 1 - area / (height * width), share), box)


def mix(image: Tensor, target: Tensor, plan: MixPlan, *, num_classes: int) -> tuple[Tensor, Tensor]:
    """Mix each sample p of a batch with its neighbor p xor 1.

    ``image`` (N, C, H, W) float with N even; ``target`` (N,) int64; ``plan`` for N / 2 pairs, on any device. Returns
    the mixed images and (N, num_classes) float class probabilities.
    """
    height, width = image.shape[2:]
    pixel_share, label_share, box = (part.to(image.device, non_blocking=True) for part in plan)
    rows = torch.arange(height, device=image.device)
    columns = torch.arange(width, device=image.device)
    in_rows = (rows >= box[:, 0:1]) & (rows < box[:, 1:2])
    in_columns = (columns >= box[:, 2:3]) & (columns < box[:, 3:4])
    weight = torch.where(in_rows[:, :, None] & in_columns[:, None, :], 0.0, pixel_share[:, None, None])
    labels = torch.nn.functional.one_hot(target, num_classes).to(image.dtype)
    return _blend(image, weight[:, None, None]), _blend(labels, label_share[:, None, None])


def _blend(x: Tensor, weight: Tensor) -> Tensor:
    """``weight * x[p] + (1 - weight) * x[p ^ 1]``; weight broadcasts against (P, 2, ...). Exact at 0 and 1."""
    pairs = x.unflatten(0, (-1, 2))
    return torch.lerp(pairs.flip(1), pairs, weight).flatten(0, 1)
