"""IntraQ: its two losses by hand and in float64, and images of a class that differ more with them."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from qtrain.spec import DataInfo
from qtrain.synthesis.base import Made
from qtrain.synthesis.intraq import IntraQ, marginal_distance, soft_inception
from qtrain.synthesis.model_outputs import FrozenModels, last_layers

CPU = torch.device("cpu")
Net = Callable[[], nn.Sequential]


def test_soft_inception_matches_values_computed_by_hand() -> None:
    """Probabilities of the label 0.75 and 0.5, wanted 0.95 and 1.0: (0.04 + 0.25) / 2."""
    logits = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])
    loss = soft_inception(logits, torch.tensor([0, 1]), torch.tensor([0.95, 1.0]))
    assert loss.item() == pytest.approx(0.145)


def by_hand(features: Tensor, labels: Tensor, nearest: float, farthest: float) -> tuple[float, Tensor]:
    """The marginal distance and its gradient with the centers held, in float64, image by image."""
    points = features.double().requires_grad_()
    losses = []
    for n, label in enumerate(labels.tolist()):
        members = [k for k, other in enumerate(labels.tolist()) if other == label]
        if len(members) == 1:
            continue
        center = torch.stack([points[k].detach() for k in members]).mean(dim=0)
        away = 1 - points[n] @ center / (points[n].norm() * center.norm())
        losses.append((nearest - away).clamp(min=0) + (away - farthest).clamp(min=0))
    total = torch.stack(losses).mean()
    (grad,) = torch.autograd.grad(total, points)
    return total.item(), grad


@pytest.mark.parametrize(("nearest", "farthest"), [(0.05, 0.8), (0.4, 0.5), (0.0, 0.1)])
def test_marginal_distance_and_its_gradient(nearest: float, farthest: float) -> None:
    features = torch.randn(12, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 0, 1, 3, 0])
    loss = marginal_distance(features, labels, nearest=nearest, farthest=farthest)
    (grad,) = torch.autograd.grad(loss, features)
    expected, wanted = by_hand(features.detach(), labels, nearest, farthest)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(grad.double(), wanted, rtol=1e-4, atol=1e-6)
    assert not grad[10].any(), "the only image of its class"


def test_marginal_distance_is_zero_inside_the_ring_and_for_single_images() -> None:
    features = torch.tensor([[1.0, 0.5], [1.0, -0.5], [0.3, 0.3]])  # cosine to the center (1, 0) is 0.894
    labels = torch.tensor([0, 0, 1])
    assert marginal_distance(features, labels, nearest=0.1, farthest=0.2).item() == 0
    assert marginal_distance(features, labels, nearest=0.2056, farthest=0.9).item() == pytest.approx(0.1, abs=1e-3)
    assert marginal_distance(features, torch.arange(3), nearest=0.5, farthest=0.9).item() == 0


def make(method: IntraQ, net: nn.Module, info: DataInfo, number: int = 0) -> Made:
    return method.make([net], info, number=number, seed=0, device=CPU)


def test_images_come_close_to_the_statistics_with_their_labels(trained_net: Net, digits_info: DataInfo) -> None:
    method = IntraQ(batch_size=80, steps=60, lr=0.1, label=10.0, shift=1, flip=False)
    made = make(method, trained_net(), digits_info)
    assert made.metrics["statistics"] < made.metrics["noise_statistics"] / 6
    assert made.metrics["as_labeled"] > 0.8
    assert made.labels.tolist()[:16] == [0] * 8 + [1] * 8


def test_a_wider_ring_spreads_the_features_of_a_class(trained_net: Net, digits_info: DataInfo) -> None:
    def spread(distance: float) -> float:
        method = IntraQ(
            batch_size=20, steps=30, statistics=0.0, label=1.0, distance=distance, nearest=0.3, farthest=0.8,
            images_per_class=10, shift=0, flip=False, smallest_crop=1.0,
        )  # fmt: skip
        net, made = trained_net(), make(method, trained_net(), digits_info)
        images = (made.images.permute(0, 3, 1, 2).float() / 255 - digits_info.mean[0]) / digits_info.std[0]
        features = net[:-1](images)
        distances = []
        for label in (0, 1):
            own = features[made.labels == label]
            distances.append(1 - torch.cosine_similarity(own, own.mean(dim=0, keepdim=True), dim=1).mean())
        return torch.stack(distances).mean().item()

    assert spread(10.0) > 1.5 * spread(0.0)


def test_batch_is_a_function_of_its_number(trained_net: Net, digits_info: DataInfo) -> None:
    method, net = IntraQ(batch_size=8, steps=3), trained_net()
    makes = [make(method, net, digits_info, number) for number in range(3)]
    again = make(IntraQ(batch_size=8, steps=3), trained_net(), digits_info, 2)
    assert torch.equal(again.images, makes[2].images) and torch.equal(again.labels, makes[2].labels)
    assert again.metrics == makes[2].metrics


def test_wanted_probabilities_are_drawn_for_each_image() -> None:
    wanted = IntraQ(batch_size=400, smallest_target=0.9)._wanted(number=2, seed=1)
    assert wanted.min() >= 0.9 and wanted.max() <= 1
    assert wanted.mean().item() == pytest.approx(0.95, abs=0.005)
    halves = [IntraQ(batch_size=200, smallest_target=0.9)._wanted(number=n, seed=1) for n in (4, 5)]
    assert torch.equal(wanted, torch.cat(halves))


def test_a_model_without_statistics_is_refused() -> None:
    with pytest.raises(ValueError, match="no batch norm layer"):
        IntraQ().check([nn.Sequential(nn.Linear(2, 2))])


class Heads(nn.Module):
    """Logits of two heads over two halves of the channels, as a distilled transformer has them, behind a wide layer."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(2, 3)
        self.stem, self.norm, self.wide = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.distilled = nn.Linear(2, 3)
        self.unused = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.wide(self.norm(self.stem(x))).mean(dim=(2, 3)).chunk(2, dim=1)
        logits: Tensor = (self.head(one) + self.distilled(two)) / 2
        return logits


def test_features_are_those_before_all_heads() -> None:
    torch.manual_seed(0)
    model, images = Heads(), torch.randn(5, 1, 6, 6)
    model(images)  # statistics
    model.eval()
    (told,) = FrozenModels([model], example=images[:1], compile=False)(images)
    torch.testing.assert_close(told.features, model.wide(model.norm(model.stem(images))).mean(dim=(2, 3)))
    torch.testing.assert_close(told.logits, model(images))


def test_features_of_a_convolution_that_gives_the_logits() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Conv2d(2, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    images = torch.randn(5, 1, 6, 6)
    model(images)
    (told,) = FrozenModels([model.eval()], example=images[:1], compile=False)(images)
    torch.testing.assert_close(told.features, model[:2](images).flatten(1))
    lost = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    lost.register_forward_hook(lambda module, args, output: torch.zeros(len(output), 3))
    with pytest.raises(
        ValueError, match="Sequential has no linear layer or convolution whose output becomes the logits"
    ):
        last_layers(lost, images[:1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images_per_class": 0}, "images_per_class must be at least 1, got 0"),
        ({"smallest_target": 0.0}, r"smallest_target must be in \(0, 1\], got 0.0; a probability"),
        ({"nearest": 0.8, "farthest": 0.5}, "nearest=0.8 and farthest=0.5"),
        ({"distance": -1.0}, "distance must be at least 0, got -1.0"),
    ],
)
def test_options_out_of_range(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IntraQ(**options)  # type: ignore[arg-type]
