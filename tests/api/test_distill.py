"""``qtrain.distill``: the command's fit on loaders of one's own, exactly resumable, and a loop without it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import qtrain
from tests.api.test_quantize import Net


class Noisy(Dataset[tuple[Tensor, int]]):
    """Images whose class is their brightest channel, with noise drawn anew at each look."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.randint(3, (count,), generator=generator)
        self.images = torch.rand(count, 3, 8, 8, generator=generator)
        self.images[torch.arange(count), self.labels] += 1

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        return self.images[number] + 0.1 * torch.rand(3, 8, 8), int(self.labels[number])


def loader(workers: int = 0, *, own_generator: bool = False) -> DataLoader[tuple[Tensor, int]]:
    generator = torch.Generator() if own_generator else None
    if generator is not None:
        generator.seed()
    return DataLoader(Noisy(48), batch_size=8, shuffle=True, num_workers=workers, generator=generator)


def student() -> nn.Module:
    torch.manual_seed(0)
    return qtrain.quantize(Net(), torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(1)))


def test_distilling_teaches_and_leaves_the_teacher_alone() -> None:
    torch.manual_seed(1)
    teacher = Net()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    teacher.train()
    learner = student()
    metrics = qtrain.distill(learner, loader(), teacher=teacher, val_loader=loader(), epochs=4, lr=0.1)
    assert metrics["top1"] > 80
    assert teacher.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert not learner.training
    assert qtrain.distill(learner, loader(), epochs=1) == {}, "without images for validation nothing is measured"


class Dies(pl.Callback):
    """Kills the training before step ``step``."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.global_step == self.step:
            raise KeyError("killed")


@pytest.mark.parametrize("own_generator", [False, True])
@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_killed_training_ends_as_the_undisturbed_one(workers: int, own_generator: bool, tmp_path: Path) -> None:
    whole, killed, again = student(), student(), student()

    def train(learner: nn.Module, folder: str, *callbacks: pl.Callback) -> None:
        options = ["fit.checkpoint_every_steps=4"]
        images = loader(workers, own_generator=own_generator)
        qtrain.distill(learner, images, epochs=2, folder=tmp_path / folder, options=options, callbacks=list(callbacks))

    train(whole, "whole")
    with pytest.raises(KeyError, match="killed"):
        train(killed, "killed", Dies(9))
    torch.manual_seed(77)  # another process would have other random numbers
    train(again, "killed")
    one, other = whole.state_dict(), again.state_dict()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert not torch.equal(one["middle.weight"], killed.state_dict()["middle.weight"])


def test_a_loop_of_ones_own_trains() -> None:
    learner = qtrain.quantize(
        student_network := Net(), torch.rand(8, 3, 8, 8), weight_bits=1, weight="bnn", ends=None, input="lsq"
    )
    assert student_network is not learner
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.02)
    losses = []
    batches = [batch for _ in range(6) for batch in loader()]
    for step, (image, label) in enumerate(batches):
        qtrain.begin_step_(learner.train(), step=step, steps=len(batches))
        loss = nn.functional.cross_entropy(learner(image), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        qtrain.project_(learner)
        losses.append(float(loss))
    assert sum(losses[-6:]) < 0.8 * sum(losses[:6])
    assert learner.get_submodule("middle").weight.abs().max() <= 1, "binary weights are clipped after each step"


def test_a_step_beyond_the_last_is_refused() -> None:
    with pytest.raises(ValueError, match=r"begin_step_: step must be in 0..2, got 3"):
        qtrain.begin_step_(student(), step=3, steps=3)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([torch.rand(4, 3, 8, 8)], r"must yield \(image, label\), two tensors, got Tensor"),
        ([(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.zeros(4).long())], r"got torch.uint8 .*, and images ToT"),
        ([(torch.zeros(3, 8, 8), 1)], r"two tensors, got \(Tensor, int\); a dataset needs a DataLoader"),
        ([(torch.zeros(4, 3, 8, 8), torch.zeros(4))], r"labels \(N,\) that number classes, .* torch.float32 \(4,\)"),
        ([(torch.zeros(3, 8, 8), torch.tensor(1))], r"\(\); a dataset needs a DataLoader"),
        ([(torch.zeros(2, 3, 8, 8), torch.tensor([1, 4]))], "labels from 1 to 4, and the student has 4 classes"),
        ([(torch.zeros(2, 3, 8, 8), torch.tensor([-2, 3]))], "labels from -2 to 3"),
        ([(torch.zeros(2, 3, 8, 8), torch.zeros(2, 5))], r"torch.float32 \(2, 5\)"),
        ([], "has no batches"),
    ],
)
def test_a_loader_of_something_else_is_refused(items: list[object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        qtrain.distill(student(), DataLoader(items, batch_size=None), epochs=1)  # type: ignore[arg-type]


def test_training_takes_probabilities_and_images_without_labels() -> None:
    shares, none = torch.full((2, 4), 0.25), torch.tensor([-1, 3])
    for labels in (shares, none):
        qtrain.distill(student(), DataLoader([(torch.zeros(2, 3, 8, 8), labels)], batch_size=None), epochs=1)  # type: ignore[arg-type]


def test_validation_images_need_labels_of_the_classes_before_anything_is_trained() -> None:
    for label in (-1, 4):
        items = [(torch.zeros(2, 3, 8, 8), torch.tensor([1, label]))]
        with pytest.raises(ValueError, match="the student has 4 classes"):
            qtrain.distill(student(), loader(), val_loader=DataLoader(items, batch_size=None), epochs=1)  # type: ignore[arg-type]


def test_a_teacher_of_other_classes_may_give_hints() -> None:
    """Where nobody looks at its logits, and for images of another size than those of the calibration."""
    teacher = copy.deepcopy(Net())
    teacher.head = nn.Linear(8, 7)
    images = DataLoader(TensorDataset(torch.rand(8, 3, 16, 16), torch.randint(4, (8,))), batch_size=4)
    options = ["distill.student_layers=[middle]", "distill.teacher_layers=[middle]"]
    qtrain.distill(student(), images, teacher=teacher, objective="hint", epochs=1, options=options)
    with pytest.raises(ValueError, match=r"must give logits \(1, 4\) for images \(1, 3, 16, 16\), got \(1, 7\)"):
        qtrain.distill(student(), images, teacher=teacher, epochs=1)


def test_labels_beyond_the_classes_are_refused_in_any_batch() -> None:
    items = [(torch.zeros(2, 3, 8, 8), torch.tensor([1, label])) for label in (3, 4)]
    with pytest.raises(ValueError, match="labels from 1 to 4"):
        qtrain.distill(student(), DataLoader(items, batch_size=None), epochs=1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ("resnet18", "distill: teacher must be a network, a torch.nn.Module, got 'resnet18'"),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 7)), r"must give logits \(1, 4\) .*got \(1, 7\)"),
        (nn.Sequential(nn.Flatten(), nn.Linear(10, 4)), r"teacher: Sequential fails on images \(1, 3, 8, 8\)"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused_before_training(teacher: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        qtrain.distill(student(), loader(), teacher=teacher, epochs=1)  # type: ignore[arg-type]


def test_an_unknown_option_is_refused_before_training() -> None:
    learner = student()
    before = copy.deepcopy(learner.state_dict())
    with pytest.raises(ValueError, match="optimiser"):
        qtrain.distill(learner, loader(), epochs=1, options=["optimiser.lr=0.1"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in learner.state_dict().items())


def test_a_folder_of_another_training_is_refused(tmp_path: Path) -> None:
    """Its resume points would make the other student of this one."""
    torch.manual_seed(3)
    teacher, other_teacher = Net(), Net()

    def train(learner: nn.Module, taught: nn.Module | None) -> None:
        qtrain.distill(learner, loader(), teacher=taught, epochs=1, folder=tmp_path / "run")

    first = student()
    train(first, teacher)
    torch.manual_seed(1)
    images = torch.rand(8, 3, 8, 8)
    fewer_bits, other_weights = qtrain.quantize(Net(), images, weight_bits=2), qtrain.quantize(Net(), images)
    for learner, taught in ((fewer_bits, teacher), (other_weights, teacher), (student(), other_teacher)):
        before = {name: tensor.clone() for name, tensor in learner.state_dict().items()}
        with pytest.raises(ValueError, match=r"belongs to a run with another configuration.*take another folder"):
            train(learner, taught)
        assert all(torch.equal(tensor, before[name]) for name, tensor in learner.state_dict().items())
    again = student()
    train(again, teacher)
    assert all(torch.equal(tensor, first.state_dict()[name]) for name, tensor in again.state_dict().items())


def test_a_student_whose_training_was_interrupted_goes_on_with_it(tmp_path: Path) -> None:
    """The same object, half trained, as in a notebook; and once it has ended, it may learn more elsewhere."""
    learner, options = student(), ["fit.checkpoint_every_steps=1"]
    with pytest.raises(KeyError, match="killed"):
        qtrain.distill(learner, loader(), epochs=1, folder=tmp_path / "a", options=options, callbacks=[Dies(3)])
    qtrain.distill(learner, loader(), epochs=1, folder=tmp_path / "a", options=options)
    whole = student()
    qtrain.distill(whole, loader(), epochs=1, folder=tmp_path / "b", options=options)
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in learner.state_dict().items())
    assert "qtrain_begun" not in vars(learner)


def test_the_callers_random_numbers_go_on_as_before_a_training() -> None:
    learner, images = student(), loader()
    torch.manual_seed(11)
    expected = torch.rand(2)
    torch.manual_seed(11)
    qtrain.distill(learner, images, epochs=1)
    assert torch.equal(torch.rand(2), expected)


def test_labels_of_few_bits_number_classes_too() -> None:
    images, labels = torch.rand(16, 3, 8, 8), torch.randint(3, (16,))
    results = []
    for dtype in (torch.int64, torch.int32, torch.uint8):
        learner = student()
        same = DataLoader(TensorDataset(images, labels.to(dtype)), batch_size=8)
        results.append(qtrain.distill(learner, same, val_loader=same, epochs=1))
    assert results[0] == results[1] == results[2]


def test_a_validation_without_batches_is_refused_before_training() -> None:
    learner, empty = student(), DataLoader(TensorDataset(torch.rand(0, 3, 8, 8), torch.zeros(0, dtype=torch.int64)))
    before = learner.state_dict()["middle.weight"].clone()
    with pytest.raises(ValueError, match="the loader for validation has no batches"):
        qtrain.distill(learner, loader(), val_loader=empty, epochs=1)
    assert torch.equal(learner.state_dict()["middle.weight"], before)


def pairs(images: Tensor) -> DataLoader[Any]:
    return DataLoader(TensorDataset(images, torch.zeros(len(images), dtype=torch.long)), batch_size=4)


@pytest.mark.parametrize(
    ("train", "validation", "message"),
    [
        (pairs(torch.rand(8, 1, 8, 8)), None, "distill: images of the loader: .* fails on images"),
        (loader(), pairs(torch.rand(8, 1, 8, 8)), "distill: images of val_loader: .* fails on images"),
        (pairs(torch.rand(8, 3, 8, 8).double()), None, "images of the loader have 64 bits"),
    ],
)
def test_images_that_the_student_does_not_take_are_refused_before_it_trains(
    train: Any, validation: Any, message: str
) -> None:
    learner = student()
    before = {name: tensor.clone() for name, tensor in learner.state_dict().items()}
    with pytest.raises(ValueError, match=message) as error:
        qtrain.distill(learner, train, val_loader=validation, epochs=1)
    assert "\n" not in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in learner.state_dict().items())


def test_a_list_of_batches_is_a_loader_too() -> None:
    batches: Any = [(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])) for _ in range(2)]
    assert qtrain.distill(student(), batches, val_loader=batches, epochs=1)["loss"] > 0


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16, torch.double])
def test_a_network_of_other_numbers_teaches_its_own_student(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    network = Net().to(dtype)
    learner = qtrain.quantize(network, torch.rand(8, 3, 8, 8).to(dtype))
    qtrain.distill(learner, pairs(torch.rand(8, 3, 8, 8).to(dtype)), teacher=network, epochs=1)
    assert next(network.parameters()).dtype == dtype
