"""Any timm model by name: what is adapted, what is said, what is refused."""

from __future__ import annotations

import logging
from pathlib import Path

import huggingface_hub.constants
import pytest
import timm
import torch
from torch import nn

from qtrain.models import factory, hub
from qtrain.models.factory import adapt_small_stem, create_model


def test_head_channels_and_stem_are_adapted_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="qtrain")
    model = create_model(name="resnet18", num_classes=7, in_channels=1, image_size=32, adapt_stem=True)
    assert model.fc.out_features == 7
    assert model.conv1.in_channels == 1
    assert (model.conv1.kernel_size, model.conv1.stride, model.conv1.padding) == ((3, 3), (1, 1), (1, 1))
    assert isinstance(model.maxpool, nn.Identity)
    assert model.forward_features(torch.randn(1, 1, 32, 32)).shape == (1, 512, 4, 4)
    assert "head of 7 classes instead of 1000" in caplog.text
    assert "stem for 1 channels instead of 3" in caplog.text
    assert "conv1 7x7 stride 2 -> 3x3 stride 1, maxpool -> none" in caplog.text


def test_stem_is_left_unless_asked() -> None:
    model = create_model(name="resnet18", num_classes=7, image_size=32)
    assert model.conv1.stride == (2, 2)
    assert isinstance(model.maxpool, nn.MaxPool2d)


@pytest.mark.parametrize(
    ("name", "size", "line"),
    [
        ("resnet18", 224, "stem left as it is, 224 pixels are more than 64"),
        ("test_vit", 32, "stem left as it is, patch_embed.proj cuts patches of (16, 16) pixels"),
        ("cifar_resnet8", 32, "nothing to adapt"),
        ("test_efficientnet", 32, "conv_stem 3x3 stride 2 -> 3x3 stride 1"),
    ],
)
def test_other_stems_are_adapted_or_left(name: str, size: int, line: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="qtrain")
    model = create_model(name=name, num_classes=3, image_size=size, adapt_stem=True)
    assert line in caplog.text
    assert model.eval()(torch.randn(1, 3, size, size)).shape == (1, 3)


def test_a_kept_stem_is_the_center_of_the_old_one() -> None:
    model = timm.create_model("resnet18")
    center = model.conv1.weight[:, :, 2:5, 2:5].clone()
    adapt_small_stem(model, keep_weights=True)
    assert torch.equal(model.conv1.weight, center)


def test_an_adapted_model_loads_its_own_file(tmp_path: Path) -> None:
    options = {"name": "resnet18", "num_classes": 3, "image_size": 32, "adapt_stem": True, "channels": (8, 8, 8, 8)}
    source = create_model(**options)
    torch.save(source.state_dict(), tmp_path / "w.pt")
    target = create_model(**options, weights=str(tmp_path / "w.pt"))
    assert torch.equal(source.conv1.weight, target.conv1.weight)


def test_fixed_input_sizes_follow_the_data() -> None:
    model = create_model(name="test_vit", num_classes=3, image_size=48)
    assert model.eval()(torch.randn(1, 3, 48, 48)).shape == (1, 3)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"name": "resnt18"}, r"no model 'resnt18'; did you mean 'resnet18'"),
        ({"name": "zzzzzzzz"}, r"no model 'zzzzzzzz'; timm.list_models\(\) names all"),
        ({"name": "resnet18.nope"}, r"no weights tagged 'nope'; there are: .*resnet18.a1_in1k"),
        ({"name": "cifar_resnet8", "widht": 2}, r"does not take these options: .*'widht'"),
        ({"name": "cifar_resnet8", "num_classes": 0}, r"must be at least 1, got 0 and 3"),
        ({"name": "cifar_resnet8", "pretrained": True}, r"no pretrained weights for cifar_resnet8"),
    ],
)
def test_wrong_inputs_are_one_line(options: dict, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "hub_reachable", lambda: True)
    with pytest.raises(ValueError, match=line) as caught:
        create_model(**({"num_classes": 10} | options))
    assert "\n" not in str(caught.value)


def test_without_network_the_cache_alone_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = []

    def fetch(*_: object, **__: object) -> nn.Module:
        seen.append(huggingface_hub.constants.HF_HUB_OFFLINE)
        raise ConnectionError("nothing there\nsecond line")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "hub_reachable", lambda: False)
    monkeypatch.setattr(factory.timm, "create_model", fetch)
    with pytest.raises(ValueError, match=r"no pretrained weights for resnet18 \(ConnectionError: nothing there\)"):
        create_model(name="resnet18", num_classes=10, pretrained=True)
    assert seen == [True]
    assert huggingface_hub.constants.HF_HUB_OFFLINE is False


def test_weights_file_wins_over_pretrained_without_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = create_model(name="test_resnet", num_classes=3)
    torch.save(source.state_dict(), tmp_path / "w.pt")
    monkeypatch.setattr("qtrain.models.factory.offline_unless_reachable", lambda: pytest.fail("asked the hub"))
    made = create_model(name="test_resnet", num_classes=3, weights=str(tmp_path / "w.pt"), pretrained=True)
    assert all(torch.equal(tensor, made.state_dict()[name]) for name, tensor in source.state_dict().items())
