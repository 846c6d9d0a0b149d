"""A network and images of one's own, as README's lines import them: nothing of qtrain, nothing of timm.

The images are scikit-learn's handwritten digits, 1,797 real ones of 8x8 pixels.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

TRAIN = 1200
"""So many images train; the other 597 validate."""


class Net(nn.Module):
    """Two convolutions with batch norm, and a matrix: (N, 1, 8, 8) -> (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(32 * 4 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(x).flatten(1))
        return logits


def loaders() -> tuple[DataLoader[tuple[Tensor, ...]], DataLoader[tuple[Tensor, ...]]]:
    """Training and validation images, normalized."""
    digits = load_digits()
    images = (torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16 - 0.3) / 0.37
    labels = torch.tensor(digits.target)
    train = TensorDataset(images[:TRAIN], labels[:TRAIN])
    validation = TensorDataset(images[TRAIN:], labels[TRAIN:])
    return DataLoader(train, batch_size=60, shuffle=True), DataLoader(validation, batch_size=200)


def trained(epochs: int = 8, seed: int = 0) -> Net:
    """The network after a short training in full precision."""
    torch.manual_seed(seed)
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for _ in range(epochs):
        for image, label in train_loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(image), label).backward()
            optimizer.step()
    return net.eval()


@torch.no_grad()
def top1(net: nn.Module) -> float:
    """Percent of the validation images that ``net`` gets right."""
    right = sum(int((net(image).argmax(dim=1) == label).sum()) for image, label in val_loader)
    return 100 * right / len(val_loader.dataset)  # type: ignore[arg-type]


train_loader, val_loader = loaders()
model = trained()
