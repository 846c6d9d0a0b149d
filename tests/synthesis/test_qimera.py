"""Qimera's superposed classes: the code by hand, what is asked for, and where embeddings start."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qtrain.synthesis.conditioning import Mixture
from qtrain.synthesis.qimera import Qimera, Superposition, classifier_rows


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_superposition_matches_a_code_computed_by_hand() -> None:
    torch.manual_seed(0)
    table = torch.tensor([[3.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    embedding = Superposition(table=table, latent=4)
    unit = table / (12 / 6) ** 0.5  # mean square one
    torch.testing.assert_close(embedding.classes.detach(), unit)
    mixture = Mixture(torch.tensor([[0, 2], [1, 0]]), torch.tensor([[0.75, 0.25], [1.0, 0.0]]))
    noise = torch.randn(2, 2, generator=rng())
    mixed = torch.stack([0.75 * unit[0] + 0.25 * unit[2], unit[1]]) + noise
    expected = mixed @ embedding.mapping.weight.T + embedding.mapping.bias
    torch.testing.assert_close(embedding(mixture, noise), expected)


@pytest.mark.parametrize(("num_classes", "classes"), [(2, 2), (10, 2), (10, 4)])
def test_mixture_has_the_requested_classes_and_shares(num_classes: int, classes: int) -> None:
    labels = torch.arange(200) % num_classes
    mixture = Qimera(superposed=0.4, classes=classes).mix(labels, num_classes, rng())
    assert mixture.classes.shape == mixture.shares.shape == (200, classes)
    assert all(len(set(row)) == classes and max(row) < num_classes for row in mixture.classes.tolist())
    assert torch.equal(mixture.classes[:, 0], labels)
    torch.testing.assert_close(mixture.shares.sum(dim=1), torch.ones(200))
    assert torch.equal(mixture.probabilities(num_classes).argmax(dim=1), labels), "the label has the largest share"
    assert ((mixture.shares > 0).all(dim=1)).sum() == 80
    assert torch.equal(mixture.shares[80:, 0], torch.ones(120))
    # Of two classes with shares softmax(N(0, 1)) the larger one is 1 / (1 + exp(-|d|)), d ~ N(0, 2).
    if classes == 2:
        d = torch.randn(100_000, generator=rng(1)) * 2**0.5
        assert mixture.shares[:80, 0].mean().item() == pytest.approx(d.abs().sigmoid().mean().item(), abs=0.03)
    met = {(a, b) for a, *others in mixture.classes[:80].tolist() for b in others}
    assert len(met) > min(num_classes * (num_classes - 1), 60) * 0.5, "each class meets many others"


def test_none_and_all_superposed() -> None:
    labels = torch.arange(10)
    assert Qimera(superposed=0.0).mix(labels, 10, rng()).shares[:, 0].tolist() == [1.0] * 10
    assert (Qimera(superposed=1.0).mix(labels, 10, rng()).shares > 0).all()


class Headless(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def test_initial_embeddings_are_classifier_rows_or_random() -> None:
    model = nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3), nn.Conv2d(1, 3, 3))
    assert torch.equal(classifier_rows(model, 3), model.get_parameter("4.weight"))
    convolutional = nn.Sequential(nn.Conv2d(1, 6, 3), nn.Conv2d(6, 3, 1))
    assert classifier_rows(convolutional, 3).shape == (3, 6)
    embedding = Qimera(latent=7).embedding([model], 3)
    assert (embedding.noise_size, embedding.latent) == (4, 7)
    random = Qimera(latent=7, start="random").embedding([Headless()], 3)
    assert (random.noise_size, random.latent) == (7, 7)
    with pytest.raises(ValueError, match=r"Headless has no linear layer with 3 outputs.*conditioning.start=random"):
        Qimera().embedding([Headless()], 3)


def test_wrong_options() -> None:
    with pytest.raises(ValueError, match=r"Qimera: superposed must be .* got 1\.5; a share of the images"):
        Qimera(superposed=1.5)
    with pytest.raises(ValueError, match="Qimera: classes must be at least 2, got 1"):
        Qimera(classes=1)
    with pytest.raises(ValueError, match="start must be 'classifier' or 'random', got 'zero'"):
        Qimera(start="zero")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"superposes 3 classes, but the model has 2; set classes=2"):
        Qimera(classes=3).embedding([Headless()], 2)
