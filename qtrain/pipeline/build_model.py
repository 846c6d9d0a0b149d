"""Full-precision models for the images that a data set has."""

from __future__ import annotations

import torch
from torch import nn

from qtrain.settings.component import Component
from qtrain.spec import DataInfo
from qtrain.utils.errors import as_config_error


def build_model(chosen: Component, info: DataInfo, *, weights: str | None = None) -> nn.Module:
    """The full-precision model ``chosen`` (``settings.model``, a teacher's) for the data's classes and channels.

    ``weights`` stands in for the component's own where it names none.
    """
    given = {"weights": weights} if weights is not None else {}
    build = chosen.build(**given)
    with as_config_error(chosen.key):
        model: nn.Module = build(num_classes=info.num_classes, in_channels=info.in_channels, image_size=info.image_size)
    return model


def has_weights(chosen: Component) -> bool:
    """Whether the model ``chosen`` comes with trained weights: from a file, or from its package."""
    return chosen.get("weights") is not None or bool(chosen.get("pretrained", False))


def example_input(info: DataInfo, size: int = 1) -> torch.Tensor:
    """A zero image batch (size, C, H, W) of the data's shape."""
    return torch.zeros(size, info.in_channels, info.image_size, info.image_size)
