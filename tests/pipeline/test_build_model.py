"""Weights that expect images of another normalization than they get are warned of, with what to type."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qtrain.config.compose import compose
from qtrain.models.normalization import Normalization
from qtrain.models.weight_file import metadata_of
from qtrain.pipeline import build_model as module
from qtrain.pipeline.build_model import build_model
from qtrain.pipeline.pretrain import _kept, trained_model
from qtrain.settings.component import Component
from qtrain.spec import DataInfo

CIFAR = Normalization((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616))
IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SMALL = ["model=cifar_resnet8", "model.width=0.25"]


def info(stated: Normalization, channels: int = 3) -> DataInfo:
    return DataInfo(
        name="some", num_classes=10, in_channels=channels, image_size=8, train_size=1, val_size=0, test_size=1,
        kind="resident", **stated._asdict(),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def said_anew() -> None:
    module._warn_once.cache_clear()


@pytest.fixture
def weights(tmp_path: Path) -> str:
    """Weights that do not say on what they were trained, so that timm's word for the architecture counts: ImageNet."""
    return saved(tmp_path / "silent.safetensors")


def saved(path: Path, stated: Normalization | None = None, channels: int = 3) -> str:
    torch.manual_seed(0)
    model = build_model(compose(SMALL).model, info(CIFAR, channels))
    save_file(model.state_dict(), path, None if stated is None else metadata_of(stated))
    return str(path)


def model_of(*overrides: str) -> Component:
    return compose([*SMALL, *overrides]).model


def test_other_normalization_is_warned_of_once_with_the_remedy(weights: str, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        build_model(model_of(f"model.weights={weights}"), info(CIFAR))
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    text = warning.getMessage()
    assert text.startswith("model: the weights expect images with mean 0.485, 0.456, 0.406 and std 0.229, 0.224, 0.225")
    assert "data.mean=[0.485,0.456,0.406] data.std=[0.229,0.224,0.225], or say by model.mean and model.std" in text


@pytest.mark.parametrize("remedy", ["data", "option", "file", "no weights", "grey"])
def test_remedies_silence_the_warning(
    weights: str, remedy: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    seen, own = CIFAR, [f"model.weights={weights}"]
    if remedy == "data":
        seen = IMAGENET
    elif remedy == "option":
        own += CIFAR.as_overrides("model").split()
    elif remedy == "file":
        own = [f"model.weights={saved(tmp_path / 'w.safetensors', CIFAR)}"]
    elif remedy == "no weights":
        own = []
    channels = 1 if remedy == "grey" else 3
    if remedy == "grey":
        seen, own = Normalization((0.3,), (0.4,)), [f"model.weights={saved(tmp_path / 'w.safetensors', channels=1)}"]
    build_model(model_of(*own), info(seen, channels))
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_teachers_have_a_normalization_of_their_own(
    weights: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    teacher = ["teacher=cifar_resnet20", "model@teacher.model=cifar_resnet8", "teacher.model.width=0.25"]
    settings = compose([*SMALL, *teacher, f"teacher.model.weights={weights}"])
    data: Any = SimpleNamespace(info=info(CIFAR))
    assert settings.teacher.model is not None
    trained_model(settings.teacher.model, settings, data)
    assert "give teacher.mean=[0.485,0.456,0.406] teacher.std=[0.229,0.224,0.225]" in caplog.text
    caplog.clear()
    expecting = replace(settings, teacher=replace(settings.teacher, **IMAGENET._asdict()))
    trained_model(settings.teacher.model, expecting, data)
    assert caplog.text.count("the weights expect") == 0


def test_how_a_file_is_read_does_not_change_which_weights_are_trained() -> None:
    """Weights that were kept before these options came are found, and those that say their normalization too."""
    data: Any = SimpleNamespace(info=info(CIFAR), content=lambda: "images")
    plain = compose(SMALL)
    told = compose([*SMALL, *CIFAR.as_overrides("model").split()])
    assert _kept(plain.model, plain, data) == _kept(told.model, told, data)
    wider = compose([*SMALL, "model.width=0.5"])
    assert _kept(plain.model, plain, data) != _kept(wider.model, wider, data)
