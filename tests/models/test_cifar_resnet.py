"""The CIFAR ResNets against what the paper says of them, and against timm's conventions."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from qtrain.models import cifar_resnet
from qtrain.models.factory import create_model


@pytest.mark.parametrize(
    ("layers", "parameters"), [(20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018), (110, 1_727_962)]
)
def test_parameter_counts_of_the_paper(layers: int, parameters: int) -> None:
    # He et al., table 6: 0.27, 0.46, 0.66, 0.85 and 1.7 million; option A adds none.
    model = create_model(name=f"cifar_resnet{layers}", num_classes=10)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules()) == layers


def test_option_b_adds_two_convolutions() -> None:
    a = create_model(name="cifar_resnet20", num_classes=10)
    b = create_model(name="cifar_resnet20", num_classes=10, shortcut="B")
    extra = sum(p.numel() for p in b.parameters()) - sum(p.numel() for p in a.parameters())
    assert extra == 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64
    assert b(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_pad_shortcut_by_hand() -> None:
    x = torch.arange(1.0, 17.0).view(1, 1, 4, 4)
    y = cifar_resnet.PadShortcut(extra=3, stride=2)(x)
    assert y.shape == (1, 4, 2, 2)
    assert y[0, 1].tolist() == [[1, 3], [9, 11]]  # one zero channel before, two behind
    assert y[0, [0, 2, 3]].abs().sum() == 0


def test_residual_sum_takes_the_shortcut() -> None:
    block = cifar_resnet.BasicBlock(in_channels=4, channels=4, stride=1, shortcut="A").eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(block(x), x.relu())


def test_a_shortcut_around_each_convolution() -> None:
    """Bi-Real Net, section 3.1: what a convolution of zeros leaves is its shortcut, and the signs of both survive."""
    block = cifar_resnet.BasicBlock(
        in_channels=2, channels=4, stride=2, shortcut="A", shortcut_per_conv=True, activation="hardtanh"
    ).eval()
    x = 3 * torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    around = torch.zeros(2, 4, 4, 4)
    around[:, 1:3] = x[:, :, ::2, ::2]
    with torch.no_grad():
        first = block.bn1(block.conv1(x))
        nn.init.zeros_(block.conv2.weight)
        torch.testing.assert_close(block(x), (first + around).clamp(-1, 1))
        nn.init.zeros_(block.conv1.weight)
        torch.testing.assert_close(block(x), around.clamp(-1, 1))
        nn.init.ones_(block.conv2.weight)
        once = around.clamp(-1, 1)
        torch.testing.assert_close(block(x), (block.bn2(block.conv2(once)) + once).clamp(-1, 1))


@pytest.mark.parametrize("activation", ["relu", "hardtanh", "identity"])
def test_variants_keep_the_parameters_and_their_names(activation: str) -> None:
    plain = create_model(name="cifar_resnet20", num_classes=10)
    other = create_model(name="cifar_resnet20", num_classes=10, shortcut_per_conv=True, activation=activation)
    other.load_state_dict(plain.state_dict(), strict=True)
    kinds = [type(m) for m in other.modules() if type(m) in (nn.ReLU, nn.Hardtanh)]
    assert len(kinds) == {"relu": 19, "hardtanh": 19, "identity": 0}[activation], "the stem's and two a block"
    assert len(set(kinds)) <= 1
    assert sum(isinstance(m, cifar_resnet.ResidualSum) for m in other.modules()) == 18
    assert other(torch.randn(2, 3, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize(("channels", "size", "width"), [(1, 8, 0.5), (3, 32, 1.0), (3, 33, 1.5)])
def test_channels_sizes_and_widths(channels: int, size: int, width: float) -> None:
    model = create_model(name="cifar_resnet8", num_classes=7, in_channels=channels, width=width)
    assert model(torch.randn(2, channels, size, size)).shape == (2, 7)
    assert model.linear.in_features == round(64 * width)


def test_features_only() -> None:
    model = timm.create_model("cifar_resnet8", features_only=True)
    shapes = [tuple(f.shape) for f in model(torch.randn(1, 3, 32, 32))]
    assert shapes == [(1, 16, 32, 32), (1, 16, 32, 32), (1, 32, 16, 16), (1, 64, 8, 8)]
    assert model.feature_info.channels() == [16, 16, 32, 64]
    assert model.feature_info.reduction() == [1, 1, 2, 4]


def test_pretrained_from_file_resets_another_head(tmp_path) -> None:
    source = timm.create_model("cifar_resnet8", num_classes=10)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    overlay = {"file": str(tmp_path / "w.pth")}
    same = timm.create_model("cifar_resnet8", pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(same.linear.weight, source.linear.weight)
    other = timm.create_model("cifar_resnet8", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=4)
    assert other.linear.weight.shape == (4, 64)
    assert torch.equal(other.layer3[0].conv2.weight, source.layer3[0].conv2.weight)


def test_symbolic_trace_gives_the_same_function() -> None:
    model = create_model(name="cifar_resnet8", num_classes=10).eval()
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"shortcut": "C"}, "shortcut must be 'A' or 'B'"),
        ({"width": 0.01}, "at least one channel"),
        ({"activation": "tanh"}, "activation must be one of relu, hardtanh, identity, got 'tanh'"),
    ],
)
def test_wrong_options_are_refused(options: dict, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        create_model(name="cifar_resnet8", num_classes=10, **options)
