"""Converted and calibrated students for the tests of their files."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from qtrain.config.compose import compose
from qtrain.convert.calibrate import calibrate
from qtrain.export.header import Images, Network
from qtrain.export.networks import built
from qtrain.pipeline.prepare import convert
from qtrain.settings.run_settings import RunSettings
from qtrain.utils.importing import import_object

IMAGES = Images(size=(3, 8, 8), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), classes=("a", "b", "c", "d", "e"))
OWN = ("tests.export.networks",)
KINDS = Network("tests.export.networks.Kinds", {"width": 8, "classes": 5})
TIED = Network("tests.export.networks.Tied")


@lru_cache
def settings_of(*overrides: str) -> RunSettings:
    return compose(["quantize.enabled=true", *overrides])


def student_of(
    network: Network, overrides: Sequence[str], *, dtype: torch.dtype = torch.float32, size: int = 8
) -> tuple[nn.Module, Tensor]:
    """A student of ``network`` by the config's ``overrides``, and images for it (4, 3, size, size)."""
    torch.manual_seed(0)
    model = built(import_object(network.builder, admitted=(*OWN, "qtrain.models")), network.options)
    images = torch.rand(4, 3, size, size)
    for module in model.modules():  # as if it had been trained
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    converted = convert(settings_of(*overrides), model, images[:1])
    calibrate(model, [images], converted.plans)
    return model.eval().to(dtype), images.to(dtype)


def logits_of(model: nn.Module, images: Tensor) -> Any:
    with torch.no_grad():
        return model(images)
