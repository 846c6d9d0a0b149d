"""Converted and calibrated students for the tests of their files."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from qtrain.config.compose import compose
from qtrain.convert.calibrate import calibrate
from qtrain.costs.count import count
from qtrain.packed.header import FileSize, Images, Network
from qtrain.packed.load import load_student
from qtrain.packed.networks import TIMM, built
from qtrain.packed.save import save_student
from qtrain.pipeline.conversion import convert
from qtrain.settings.run_settings import RunSettings
from qtrain.spec import QuantSpec
from qtrain.utils.importing import import_object

IMAGES = Images(size=(3, 8, 8), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), classes=("a", "b", "c", "d", "e"))
OWN = ("tests.packed.networks",)
KINDS = Network("tests.packed.networks.Kinds", {"width": 24, "classes": 5})
TIED = Network("tests.packed.networks.Tied")

EVERYWHERE = ("quantize.bits.first=null", "quantize.bits.last=null")
"""The same bits for all layers."""

FAST = ("observer@quantize.weight_observer=min_max", "observer@quantize.input_observer=percentile")
"""Observers that need no search, one of them with a histogram; which ranges they find does not matter here."""

SERVED = {"weight": QuantSpec(bits=4, shape=(8, 4, 3, 3), signed=True), "input": QuantSpec(bits=4)}


@lru_cache
def settings_of(*overrides: str) -> RunSettings:
    return compose(["quantize.enabled=true", *FAST, *overrides])


@lru_cache
def settings_with(name: str, place: str) -> RunSettings | None:
    """The settings with the quantizer ``name`` in ``place``, all layers at the first of the usual bit widths that it
    has there; ``None`` where it is not made for that."""
    base, of_name = settings_of(), settings_of(f"quantizer@quantize.weight={name}", f"quantizer@quantize.input={name}")
    component = getattr(of_name.quantize, place)
    if name == "xnor":
        component = component.with_options(scale_map=False)  # the map is for plain convolutions only
    for bits in (4, 2, 1):
        with contextlib.suppress(ValueError):
            component.build()(spec=replace(SERVED[place], bits=bits))
            everywhere = base.quantize.bits.with_options(**{place: bits}, first=None, last=None)
            quantize = replace(base.quantize, bits=everywhere, **{place: component})
            return replace(base, quantize=quantize)
    return None


def timm_network(name: str, *, size: int, classes: int = 7, **options: object) -> Network:
    return Network(TIMM, {"name": name, "num_classes": classes, "in_channels": 3, "image_size": size, **options})


def student_of(
    network: Network,
    settings: RunSettings | Sequence[str],
    *,
    dtype: torch.dtype = torch.float32,
    size: int = 8,
    channels: int = 3,
) -> tuple[nn.Module, Tensor]:
    """A student of ``network`` by ``settings`` or the config's overrides, and images (4, channels, size, size)."""
    torch.manual_seed(0)
    if not isinstance(settings, RunSettings):
        settings = settings_of(*settings)
    model = built(import_object(network.builder, admitted=(*OWN, "qtrain.models")), network.options)
    images = torch.rand(4, channels, size, size)
    for module in model.modules():  # as if it had been trained
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    if settings.quantize.enabled:
        calibrate(model, [images], convert(settings, model, images[:1]).plans)
    return model.eval().to(dtype), images.to(dtype)


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(images)
    return logits


def saved(student: nn.Module, path: Path, network: Network, images: Images = IMAGES) -> FileSize:
    return save_student(student, path, network=network, images=images, builders=OWN)


def round_trip(
    student: nn.Module, path: Path, network: Network, images: Tensor, *, logits: Tensor | None = None
) -> nn.Module:
    """``student`` saved to ``path`` and loaded, after what every student's file must keep: logits and length."""
    size = saved(student, path, network, replace(IMAGES, size=tuple(images.shape[1:])))
    loaded = load_student(path, builders=OWN)
    assert torch.equal(logits_of(loaded, images), logits_of(student, images) if logits is None else logits)
    assert not loaded.training
    counted = count(student, images[:1]).size_bytes
    assert path.stat().st_size == size.file_bytes == size.header_bytes + counted
    assert path.stat().st_mode & 0o777 == 0o644
    return loaded
