"""The CIFAR ResNets of He et al., registered with timm.

timm has no residual network with three stages for 32x32 images, and these are what most of the quantization
literature reports on CIFAR. Registered, they are created, adapted, tapped and loaded like any other timm model.
The parameter names (``conv1``, ``layer1.0.bn2``, ``linear``, ...) are those of the public checkpoints.

Source: K. He et al., Deep Residual Learning for Image Recognition, 2016, section 4.2. The variant with a shortcut
around each convolution, which binary networks need: Z. Liu et al., Bi-Real Net, 2018 (arXiv 1808.00278), section 3.1.
"""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

BASE_CHANNELS = 16

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "hardtanh": nn.Hardtanh, "identity": nn.Identity}
"""Activations by the option's name. After a ReLU every sign is 1; the other two keep values of both signs."""


class PadShortcut(nn.Module):
    """Option A, a shortcut without parameters: every ``stride``-th pixel, zero channels added on both sides.

    (N, C, H, W) -> (N, C + extra, ceil(H / stride), ceil(W / stride)); an odd number of zero channels puts the
    larger half behind.
    """

    def __init__(self, *, extra: int, stride: int) -> None:
        super().__init__()
        self.before, self.after = extra // 2, extra - extra // 2
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


class ResidualSum(nn.Module):
    """The residual sum, as a module so that a tap or an observer can name it."""

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        return x + shortcut


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: act(bn2(conv2(act(bn1(conv1(x))))) + shortcut(x)).

    With ``shortcut_per_conv`` a shortcut around each: y = act(bn1(conv1(x)) + shortcut(x)), act(bn2(conv2(y)) + y).
    """

    def __init__(
        self,
        *,
        in_channels: int,
        channels: int,
        stride: int,
        shortcut: str,
        shortcut_per_conv: bool = False,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.add1 = ResidualSum() if shortcut_per_conv else None
        self.act1 = ACTIVATIONS[activation]()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            if shortcut == "A":
                self.shortcut = PadShortcut(extra=channels - in_channels, stride=stride)
            else:
                self.shortcut = nn.Sequential(
                    nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels)
                )
        self.add = ResidualSum()
        self.act2 = ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn1(self.conv1(x))
        if self.add1 is None:
            y = self.bn2(self.conv2(self.act1(y)))
            y = self.act2(self.add(y, self.shortcut(x)))
        else:
            y = self.act1(self.add1(y, self.shortcut(x)))
            y = self.act2(self.add(self.bn2(self.conv2(y)), y))
        return y


class CifarResNet(nn.Module):
    """A stem, three stages of ``depth`` blocks with 16, 32, 64 channels times ``width``, mean pooling, a linear head.

    ``shortcut`` is ``A`` (zero padding, no parameters) or ``B`` (1x1 convolution and batch norm) where the shape
    changes. ``shortcut_per_conv``: see :class:`BasicBlock`; ``activation``, of the stem too, is ``relu``, ``hardtanh``
    or ``identity``. Images (N, in_chans, H, W) of any size from 4x4 give logits (N, num_classes).
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential

    def __init__(
        self,
        *,
        depth: int,
        num_classes: int = 10,
        in_chans: int = 3,
        width: float = 1.0,
        shortcut: str = "A",
        shortcut_per_conv: bool = False,
        activation: str = "relu",
        drop_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        super().__init__()
        if shortcut not in ("A", "B"):
            raise ValueError(f"CifarResNet: shortcut must be 'A' or 'B', got {shortcut!r}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"CifarResNet: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        if round(BASE_CHANNELS * width) < 1:
            raise ValueError(f"CifarResNet: width must leave at least one channel of {BASE_CHANNELS}, got {width}")
        if global_pool != "avg":
            raise ValueError(f"CifarResNet: global_pool must be 'avg', got {global_pool!r}")
        base = round(BASE_CHANNELS * width)
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.num_features = self.head_hidden_size = 4 * base
        self.conv1 = nn.Conv2d(in_chans, base, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(base)
        self.act1 = ACTIVATIONS[activation]()
        self.feature_info = [{"num_chs": base, "reduction": 1, "module": "act1"}]
        before = base
        for stage, (channels, stride) in enumerate([(base, 1), (2 * base, 2), (4 * base, 2)], start=1):
            blocks = [
                BasicBlock(
                    in_channels=before if i == 0 else channels,
                    channels=channels,
                    stride=stride if i == 0 else 1,
                    shortcut=shortcut,
                    shortcut_per_conv=shortcut_per_conv,
                    activation=activation,
                )
                for i in range(depth)
            ]
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
            self.feature_info.append({"num_chs": channels, "reduction": 2 ** (stage - 1), "module": f"layer{stage}"})
            before = channels
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear: nn.Module = nn.Identity()
        self.reset_classifier(num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def reset_classifier(self, num_classes: int, global_pool: str = "avg") -> None:
        """A fresh head for ``num_classes``; 0 leaves the pooled features (N, num_features)."""
        self.num_classes = num_classes
        self.linear = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.pool(x).flatten(1)
        if self.drop_rate > 0:
            x = F.dropout(x, p=self.drop_rate, training=self.training)
        return x if pre_logits else self.linear(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


# The public checkpoints were trained on CIFAR-10 normalized with ImageNet's statistics.
_CFG: dict[str, Any] = {
    "url": "",
    "num_classes": 10,
    "input_size": (3, 32, 32),
    "pool_size": (8, 8),
    "crop_pct": 1.0,
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "first_conv": "conv1",
    "classifier": "linear",
}

default_cfgs = generate_default_cfgs({f"cifar_resnet{n}": _CFG for n in (8, 20, 32, 44, 56, 110)})


def _build(layers: int, pretrained: bool, **kwargs: Any) -> nn.Module:
    """The network of ``layers`` = 6 * depth + 2 weighted layers."""
    return build_model_with_cfg(
        CifarResNet,
        f"cifar_resnet{layers}",
        pretrained,
        feature_cfg={"out_indices": (0, 1, 2, 3)},
        depth=(layers - 2) // 6,
        **kwargs,
    )


@register_model
def cifar_resnet8(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """One block a stage, 0.08 M parameters: for tests and a first look."""
    return _build(8, pretrained, **kwargs)


@register_model
def cifar_resnet20(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Three blocks a stage, 0.27 M parameters."""
    return _build(20, pretrained, **kwargs)


@register_model
def cifar_resnet32(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Five blocks a stage, 0.46 M parameters."""
    return _build(32, pretrained, **kwargs)


@register_model
def cifar_resnet44(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Seven blocks a stage, 0.66 M parameters."""
    return _build(44, pretrained, **kwargs)


@register_model
def cifar_resnet56(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Nine blocks a stage, 0.85 M parameters."""
    return _build(56, pretrained, **kwargs)


@register_model
def cifar_resnet110(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Eighteen blocks a stage, 1.73 M parameters."""
    return _build(110, pretrained, **kwargs)
