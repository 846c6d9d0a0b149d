"""Mean and standard deviation of the images that a model's weights were trained on.

The same weights lose accuracy on images of another normalization, and nothing fails: the public ResNets for CIFAR-10
expect ImageNet's statistics, and take CIFAR's own.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

TOLERANCE = 0.005
"""Differences up to this are two roundings of the same statistics; CIFAR's and ImageNet's means differ by more."""


class Normalization(NamedTuple):
    """One value for each channel, of pixels in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def agrees(self, other: "Normalization") -> bool:
        """Whether images of one normalization serve for the other."""
        pairs = [*zip(self.mean, other.mean, strict=True), *zip(self.std, other.std, strict=True)]
        return all(math.isclose(a, b, rel_tol=0, abs_tol=TOLERANCE) for a, b in pairs)

    def as_overrides(self, section: str) -> str:
        """As it is typed: ``data.mean=[0.485,0.456,0.406] data.std=[0.229,0.224,0.225]``."""
        values = {
            name: ",".join(f"{value:g}" for value in own) for name, own in zip(("mean", "std"), self, strict=True)
        }
        return " ".join(f"{section}.{name}=[{own}]" for name, own in values.items())


def normalization(mean: object, std: object) -> Normalization | None:
    """Two lists of numbers as a normalization; ``None`` where they are no such lists, or not of pixels in [0, 1]."""
    means, stds = _numbers(mean), _numbers(std)
    fits = 0 < len(means) == len(stds) and all(0 <= value <= 1 for value in (*means, *stds)) and all(stds)
    return Normalization(means, stds) if fits else None


def stated_normalization(model: nn.Module) -> Normalization | None:
    """What ``model`` says of the weights in it, where timm's models do: in ``pretrained_cfg``."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    return normalization(cfg.get("mean"), cfg.get("std"))


def state_normalization_(model: nn.Module, stated: Normalization) -> None:
    """Make ``model`` say that its weights expect ``stated``."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    model.pretrained_cfg = {**cfg, "mean": stated.mean, "std": stated.std}  # type: ignore[assignment]


def _numbers(values: object) -> tuple[float, ...]:
    """``values`` as numbers; nothing where they are anything else."""
    listed = list(values) if isinstance(values, Sequence) else []
    numbers = [float(value) for value in listed if isinstance(value, int | float) and not isinstance(value, bool)]
    return tuple(numbers) if len(numbers) == len(listed) else ()
