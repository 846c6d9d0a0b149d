"""Small networks, one for each thing that an export must get right; x (N, 3, 8, 8) -> (N, 5)."""

import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn


class _Network(nn.Module):
    """A stem, a body of its own, the mean over the image, and a head."""

    def __init__(self, body: nn.Module, width: int = 8, head: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.body = body
        self.head = nn.Linear(head, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(torch.relu(self.norm(self.stem(x))))
        logits: Tensor = self.head(x.mean(dim=(2, 3)))
        return logits


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x))))) + x)


class SqueezeExcite(nn.Module):
    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.reduce, self.expand, self.gate = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1), gate

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.conv(x))
        return x * self.gate(self.expand(torch.relu(self.reduce(x.mean((2, 3), keepdim=True)))))


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.left(F.max_pool2d(x, 3, 2, 1)), self.right(F.avg_pool2d(x, 2))), dim=1)


class Twice(nn.Module):
    """One layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        once = torch.relu(self.conv(x))
        twice: Tensor = self.conv(once)
        return twice


class Norms(nn.Module):
    """Norms that no layer takes in: behind a concatenation, beside a layer, over the channels of each pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.grow, self.behind, self.shrink = nn.Conv2d(8, 4, 3, padding=1), nn.BatchNorm2d(12), nn.Conv2d(12, 8, 1)
        self.beside, self.conv = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
        self.depthwise, self.norm, self.up = (
            nn.Conv2d(8, 8, 3, padding=1, groups=8),
            nn.LayerNorm(8),
            nn.Conv2d(8, 8, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.shrink(torch.relu(self.behind(torch.cat((x, self.grow(x)), dim=1))))
        x = torch.relu(self.beside(x) + self.conv(x))
        x = x + self.up(self.norm(self.depthwise(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        return torch.relu(x)


class Attention(nn.Module):
    """A transformer's block over the positions of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8, eps=1e-6)
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        x = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind()
        weights = ((q * 0.5) @ k.transpose(2, 3)).softmax(dim=-1)
        x = x + self.proj((weights @ v).transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return x.transpose(1, 2).reshape(shape)


BODIES = {
    "depthwise": lambda: nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 8, 1)),
    "grouped": lambda: nn.Sequential(nn.Conv2d(8, 8, 3, stride=2, groups=2, dilation=2, padding=2), nn.LeakyReLU(0.1)),
    "residual": Residual,
    "squeeze and excite": lambda: SqueezeExcite(nn.Hardsigmoid()),
    "sigmoid gate": lambda: SqueezeExcite(nn.Sigmoid()),
    "pools and concatenation": Branches,
    "transposed": lambda: nn.Sequential(nn.ConvTranspose2d(8, 8, 3, stride=2, padding=1, output_padding=1), nn.ReLU()),
    "transposed in groups": lambda: nn.Sequential(
        nn.ConvTranspose2d(8, 8, 2, stride=2, groups=2), nn.BatchNorm2d(8), nn.ReLU()
    ),
    "same padding": lambda: nn.Sequential(
        Conv2dSame(8, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), Conv2dSame(8, 8, 4)
    ),
    "called twice": Twice,
    "attention": Attention,
    "norms": Norms,
    "norms by groups": lambda: nn.Sequential(
        nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(4, 8), nn.ReLU(),
        nn.Conv2d(8, 8, 3), nn.InstanceNorm2d(8, affine=True), nn.ReLU(),
    ),
}  # fmt: skip


def network(body: str) -> nn.Module:
    return _Network(BODIES[body]())
