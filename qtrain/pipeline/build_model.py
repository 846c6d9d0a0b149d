"""Full-precision models for the images that a data set has."""

from __future__ import annotations

import torch
from omegaconf import DictConfig
from torch import nn

from qtrain.config.instantiate import instantiate
from qtrain.spec import DataInfo
from qtrain.utils.errors import ConfigError


def build_model(node: DictConfig, info: DataInfo, *, weights: str | None = None) -> nn.Module:
    """The full-precision model of ``node`` (``cfg.model``, ``cfg.teacher.model``) for the data's classes and channels.

    ``weights`` stands in for the node's own where it names none.
    """
    given = {"weights": weights} if weights is not None else {}
    build = instantiate(node, **given)
    try:
        model: nn.Module = build(num_classes=info.num_classes, in_channels=info.in_channels, image_size=info.image_size)
    except (ValueError, OSError) as error:
        raise ConfigError(f"{node._get_full_key(None)}: {error}") from error
    return model


def example_input(info: DataInfo, size: int = 1) -> torch.Tensor:
    """A zero image batch (size, C, H, W) of the data's shape."""
    return torch.zeros(size, info.in_channels, info.image_size, info.image_size)
