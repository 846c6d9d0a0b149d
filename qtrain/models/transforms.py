"""Timm's transforms for large images, behind one function, so that data loading needs no timm.

They draw from the global generators of python, numpy and torch: to make a sample's augmentation a function of (seed,
epoch, index), seed these three around the call, as the streaming loader does.
"""

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

from PIL import Image
from timm.data.transforms_factory import transforms_imagenet_eval, transforms_imagenet_train
from torch import Tensor
from torchvision.transforms import Compose, InterpolationMode, RandomCrop, Resize

Crop: TypeAlias = Literal["random_resized", "pad", "none"]
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")


class ToMode:
    """Any PIL image to gray (``L``) or color (``RGB``): palettes, transparency and CMYK occur in large sets."""

    def __init__(self, *, mode: str) -> None:
        self.mode = mode

    def __call__(self, image: Image.Image) -> Image.Image:
        return image if image.mode == self.mode else image.convert(self.mode)


def create_transform(
    *,
    image_size: int,
    train: bool,
    mean: Sequence[float],
    std: Sequence[float],
    auto_augment: str | None = None,
    color_jitter: float | None = None,
    re_prob: float = 0.0,
    interpolation: str = "bicubic",
    crop_pct: float = 0.875,
    crop: Crop = "random_resized",
    crop_scale: tuple[float, float] = (0.08, 1.0),
    crop_padding: int = 0,
    flip: bool = True,
) -> Callable[[Image.Image], Tensor]:
    """A function from a PIL image of any size and mode to a normalized tensor (C, image_size, image_size).

    In training: a ``crop``, a mirror image with probability one half where ``flip``, then timm's ``auto_augment``
    policy (``rand-m9-mstd0.5-inc1``, ``original``, ``augmix-m5-w4-d2``, ...) or ``color_jitter``, and random erasing
    with probability ``re_prob``. The crop is ``random_resized``, of a share ``crop_scale`` of the area; or ``pad``: the
    shorter side to image_size, ``crop_padding`` black pixels around, and a square at random; or ``none``, as otherwise.
    Otherwise: the shorter side to image_size / ``crop_pct`` pixels and the center. ``interpolation`` ``random``, a
    choice for each random resized crop, means bicubic elsewhere. ``mean`` and ``std`` are in units of pixel value /
    255; their length, 1 or 3, decides between gray and color.
    """
    _check(image_size, mean, std, re_prob, interpolation, crop_pct)
    settled = "bicubic" if interpolation == "random" else interpolation
    steps = transforms_imagenet_eval(
        image_size, crop_pct=crop_pct, interpolation=settled, mean=tuple(mean), std=tuple(std)
    ).transforms
    if train:
        try:
            timm_transform = transforms_imagenet_train(
                image_size,
                color_jitter=color_jitter,  # type: ignore[arg-type]  # None: no jitter, as timm's code has it
                auto_augment=auto_augment,
                interpolation=interpolation,
                mean=tuple(mean),
                std=tuple(std),
                re_prob=re_prob,
                scale=crop_scale,
                hflip=0.5 if flip else 0.0,
            )
        except (AssertionError, KeyError, ValueError) as error:
            raise ValueError(
                f"create_transform: timm has no auto_augment policy {auto_augment!r}; it has "
                "rand-m9-mstd0.5-inc1, original, 3a and augmix-m5-w4-d2, for instance"
            ) from error
        # Geometry comes first in both: one step is timm's random resized crop, two are the central crop.
        cuts = {
            "random_resized": timm_transform.transforms[:1],
            "pad": [
                Resize(image_size, interpolation=InterpolationMode(settled)),
                RandomCrop(image_size, padding=crop_padding),
            ],
            "none": steps[:2],
        }
        steps = [*cuts[crop], *timm_transform.transforms[1:]]
    transform: Callable[[Image.Image], Tensor] = Compose([ToMode(mode="L" if len(mean) == 1 else "RGB"), *steps])
    return transform


def _check(
    image_size: int, mean: Sequence[float], std: Sequence[float], re_prob: float, interpolation: str, crop_pct: float
) -> None:
    if image_size < 1:
        raise ValueError(f"create_transform: image_size must be at least 1 pixel, got {image_size}")
    if len(mean) not in (1, 3) or len(std) != len(mean):
        raise ValueError(
            f"create_transform: mean and std must be of one length, 1 or 3, got {tuple(mean)} and {tuple(std)}"
        )
    if min(std) <= 0:
        raise ValueError(f"create_transform: std must be positive, got {tuple(std)}")
    if not 0 <= re_prob <= 1:
        raise ValueError(f"create_transform: re_prob must be in [0, 1], got {re_prob}")
    if not 0 < crop_pct <= 1:
        raise ValueError(f"create_transform: crop_pct must be in (0, 1], got {crop_pct}")
    if interpolation not in INTERPOLATIONS and interpolation != "random":
        raise ValueError(
            f"create_transform: interpolation must be one of {', '.join(INTERPOLATIONS)}, random, got {interpolation!r}"
        )
