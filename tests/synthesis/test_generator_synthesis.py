"""A generator learned against a small trained network: what its images are, and that a stop changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from qtrain.schedules.linear import Linear
from qtrain.spec import DataInfo
from qtrain.synthesis.base import Made, to_pixels
from qtrain.synthesis.conditioning import Conditioning
from qtrain.synthesis.gdfq import GDFQ, ScaledNoise
from qtrain.synthesis.generator_checkpoint import GeneratorCheckpoint
from qtrain.synthesis.generator_synthesis import GeneratorSynthesis
from qtrain.synthesis.qimera import Qimera
from qtrain.synthesis.statistics import StatisticsMatch

CLASSES = 4
"""Of the ten digits: a generator tells few classes apart sooner."""
INFO = DataInfo("digits", CLASSES, 1, 8, (0.3,), (0.37,), 720, 0, 0, "resident")
CPU = torch.device("cpu")


def normalized(images: Tensor) -> Tensor:
    """Pixels (N, H, W, C) uint8 as a model takes them."""
    return (images.permute(0, 3, 1, 2).float() / 255 - INFO.mean[0]) / INFO.std[0]


def train_on_digits(seed: int) -> nn.Module:
    """Hardly an error, in half a second."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(256, CLASSES)),
    )
    digits = load_digits(n_class=CLASSES)
    images = normalized((torch.tensor(digits.images) / 16 * 255).to(torch.uint8)[..., None])
    labels = torch.tensor(digits.target)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(30):
        part = slice(step % 6 * 120, (step % 6 + 1) * 120)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[part]), labels[part]).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return train_on_digits(0)


def synthesis(conditioning: Conditioning | None = None, **options: Any) -> GeneratorSynthesis:
    chosen = {"batch_size": 40, "steps": 90, "lr": 0.01, "statistics": 0.3, "width": 8, "snapshots": 3, **options}
    return GeneratorSynthesis(conditioning=conditioning or GDFQ(latent=10), **chosen)


def learn(made: GeneratorSynthesis, models: Sequence[nn.Module], folder: Path, seed: int = 0) -> GeneratorSynthesis:
    made.learn(models, INFO, seed=seed, folder=folder, device=CPU)
    return made


def batch(made: GeneratorSynthesis, models: Sequence[nn.Module], number: int, seed: int = 0) -> Made:
    return made.make(models, INFO, number=number, seed=seed, device=CPU)


@pytest.fixture(scope="module")
def gdfq(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> GeneratorSynthesis:
    return learn(synthesis(), [model], tmp_path_factory.mktemp("gdfq"))


def test_the_images_have_the_statistics_and_show_the_labels(model: nn.Module, gdfq: GeneratorSynthesis) -> None:
    """Figures from the bytes, beside those of noise, and those that the batch reports."""
    made = batch(gdfq, [model], 2)  # of the oldest generator
    assert made.images.shape == (40, 8, 8, 1) and made.images.dtype == torch.uint8
    noise = torch.rand(40, 8, 8, 1, generator=torch.Generator().manual_seed(0))
    with StatisticsMatch(model) as match:
        model(normalized((noise * 255).round()))
        of_noise = match.loss().item()
        logits = model(normalized(made.images))
        reached = match.loss().item()
    assert reached < of_noise / 5
    right = (logits.argmax(dim=1) == made.labels).float().mean().item()
    assert right > 0.9
    assert made.metrics == {
        "statistics": pytest.approx(reached, rel=1e-4),
        "noise_statistics": pytest.approx(of_noise, rel=0.2),
        "as_labeled": pytest.approx(right),
        "class_loss": pytest.approx(nn.functional.cross_entropy(logits, made.labels).item(), rel=1e-4),
        "age": 90,
    }


def test_labels_are_balanced_and_batches_differ(model: nn.Module, gdfq: GeneratorSynthesis) -> None:
    first, second = batch(gdfq, [model], 0), batch(gdfq, [model], 3)  # of the same generator
    assert first.labels.bincount().tolist() == [10] * CLASSES
    assert first.metrics["age"] == second.metrics["age"] == 30
    for a, b in zip(first.images, second.images, strict=True):
        assert not torch.equal(a, b)
    zeros = first.images[first.labels == 0].float()
    assert zeros.std(dim=0).mean() > 1, "images of a class differ"


def test_a_batch_is_a_function_of_its_number(model: nn.Module, gdfq: GeneratorSynthesis) -> None:
    after_others = batch(gdfq, [model], 5)
    torch.manual_seed(99)
    again = batch(gdfq, [model], 5)
    assert torch.equal(again.images, after_others.images) and again.metrics == after_others.metrics
    assert [batch(gdfq, [model], number).metrics["age"] for number in range(4)] == [30, 60, 90, 30]
    assert not torch.equal(batch(gdfq, [model], 5, seed=1).images, again.images)


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("conditioning", [GDFQ(latent=4), Qimera(latent=4)], ids=["gdfq", "qimera"])
def test_stopped_training_of_a_generator_ends_as_an_unstopped_one(
    conditioning: Conditioning, model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped between a snapshot and the save after it, so that the steps from the last save are done again."""

    def make() -> GeneratorSynthesis:
        schedule = Linear(start=1.0, end=0.1)
        return synthesis(conditioning, steps=12, batch_size=10, snapshots=4, save_every=4, lr_schedule=schedule)

    whole = learn(make(), [model], tmp_path / "whole")
    keep = GeneratorCheckpoint.keep

    def keep_and_stop(self: GeneratorCheckpoint, age: int, generator: nn.Module) -> None:
        keep(self, age, generator)
        if age == 9:
            raise StoppedError

    with monkeypatch.context() as patch:
        patch.setattr(GeneratorCheckpoint, "keep", keep_and_stop)
        with pytest.raises(StoppedError):
            learn(make(), [model], tmp_path / "stopped")
    torch.manual_seed(5)
    steps: list[int] = []
    save = GeneratorCheckpoint.save

    def count_and_save(self: GeneratorCheckpoint, step: int, *state: Any) -> None:
        steps.append(step)
        save(self, step, *state)

    monkeypatch.setattr(GeneratorCheckpoint, "save", count_and_save)
    resumed = learn(make(), [model], tmp_path / "stopped")
    assert steps == [12], "went on from step 8"
    for name in ("3.pt", "6.pt", "9.pt", "12.pt", "learning.pt"):
        states = [torch.load(tmp_path / run / "generator" / name, weights_only=True) for run in ("whole", "stopped")]
        if name == "learning.pt":
            states = [state["generator"] for state in states]
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert torch.equal(batch(whole, [model], 1).images, batch(resumed, [model], 1).images)
    learned = learn(make(), [model], tmp_path / "whole")
    assert steps == [12], "what is learned is found"
    assert torch.equal(batch(learned, [model], 2).images, batch(whole, [model], 2).images)


def test_superposed_images_lie_near_the_boundary(model: nn.Module, tmp_path: Path) -> None:
    """The margin, by how much the first class is more likely than the second: of superposed images and of plain ones.

    Of the superposed, the two classes that were asked for are the likeliest two, mostly.
    """
    conditioning = Qimera(latent=10, superposed=0.5)
    made = learn(synthesis(conditioning), [model], tmp_path)
    margins: list[list[float]] = [[], []]
    for number in (2, 5, 8):
        images = batch(made, [model], number)
        likely = model(normalized(images.images)).softmax(dim=1).topk(2)
        margin = likely.values[:, 0] - likely.values[:, 1]
        margins[0] += margin[:20].tolist()
        margins[1] += margin[20:].tolist()
        assert (likely.indices[20:, 0] == images.labels[20:]).float().mean() > 0.8
        assert (likely.indices[:20] == images.labels[:20, None]).any(dim=1).float().mean() > 0.8
    superposed, plain = (sum(part) / len(part) for part in margins)
    assert superposed < 0.75 * plain, (superposed, plain)


def test_loss_of_several_models_is_their_mean(model: nn.Module, tmp_path: Path) -> None:
    models = [model, train_on_digits(1)]
    made = learn(synthesis(steps=6, snapshots=1), models, tmp_path)
    images = batch(made, models, 0)
    found = []
    for one in models:
        with StatisticsMatch(one) as match:
            one(normalized(images.images))
            found.append(match.loss().item())
    assert images.metrics["statistics"] == pytest.approx(sum(found) / 2, rel=1e-4)
    with pytest.raises(ValueError, match="learned with other models"):
        learn(synthesis(steps=6, snapshots=1), [model], tmp_path)


def test_noise_is_scaled_by_its_class() -> None:
    torch.manual_seed(0)
    embedding = ScaledNoise(num_classes=3, latent=4)
    noise = torch.randn(2, 4)
    mixture = GDFQ(latent=4).mix(torch.tensor([2, 0]), 3, torch.Generator())
    assert torch.equal(embedding(mixture, noise), embedding.classes.weight[[2, 0]] * noise)


def test_synthesis_leaves_the_models_unchanged(model: nn.Module, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.random.get_rng_state()
    batch(learn(synthesis(steps=3, snapshots=1), [model], tmp_path), [model], 0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(torch.random.get_rng_state(), random)


def test_progress_is_logged(model: nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        learn(synthesis(steps=3, snapshots=1), [model], tmp_path)
    (line,) = [record.getMessage() for record in caplog.records if "generator: step" in record.getMessage()]
    assert "step 3/3" in line and line.endswith("0.0 min left")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 1}, "batch_size must be at least 2, got 1"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"snapshots": 0}, "snapshots must be at least 1, got 0"),
        ({"statistics": -1.0}, r"statistics must be at least 0, got -1\.0"),
        ({"steps": 3, "snapshots": 4}, "3 steps have no 4 ages; set snapshots=3"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"GeneratorSynthesis: {message}"):
        synthesis(**options)


def test_models_and_data_that_cannot_train_a_generator_are_refused(model: nn.Module, tmp_path: Path) -> None:
    one = DataInfo("one", 1, 1, 8, (0.3,), (0.37,), 0, 0, 0, "resident")
    with pytest.raises(ValueError, match=r"one has 1 class, and a generator .* give data with at least two"):
        synthesis().learn([model], one, seed=0, folder=tmp_path, device=CPU)
    with pytest.raises(ValueError, match="has no batch norm layer"):
        synthesis().check([model, nn.Sequential(nn.Flatten(), nn.Linear(64, 10))])
    with pytest.raises(ValueError, match=r"call learn\(\) before make\(\)"):
        batch(synthesis(), [model], 0)
    with pytest.raises(ValueError, match=r"no longer finite after 3 steps; lower synthesis\.lr"):
        learn(synthesis(steps=3, snapshots=1, lr=float("inf")), [model], tmp_path)
    assert not (tmp_path / "generator" / "learning.pt").exists()


def test_pixels_outside_the_range_do_not_occur(gdfq: GeneratorSynthesis, model: nn.Module) -> None:
    """Bytes are the images that the model saw, but for rounding: nothing is clipped."""
    made = batch(gdfq, [model], 2)
    assert torch.equal(to_pixels(normalized(made.images), INFO), made.images)
    assert made.images.min() < 40 and made.images.max() > 200, "and the range is used"
