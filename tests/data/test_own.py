"""Torch datasets of the user's own: what items may be, that randomness is a function, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset, Subset, TensorDataset

from qtrain.data.augment import normalize, random_crop_flip
from qtrain.data.image_set import ImageError
from qtrain.data.own import OwnImages
from qtrain.data.own_items import class_names, is_indexed, item_of, known_labels, pixels_of
from qtrain.spec import Batch
from qtrain.utils.user_code import BuilderPath, import_builder
from tests.helpers.own_package import own_package

MORE = """
import numpy as np
import torch
from torch.utils.data import IterableDataset

from ownimages.images import Pictures


def items(**odd):
    base = [(torch.full((1, 8, 8), i, dtype=torch.uint8), i % 3) for i in range(80)]
    for number, item in odd.items():
        base[int(number[1:])] = item
    return base, base[:40]


def differing():
    return items(n71=(torch.zeros(1, 9, 9, dtype=torch.uint8), 0))


def mixed():
    return items(n71=(torch.zeros(1, 8, 8), 0))


def negative():
    return items(n71=(torch.zeros(1, 8, 8, dtype=torch.uint8), -1))


def fractional():
    return items(n70=(torch.zeros(1, 8, 8, dtype=torch.uint8), 1.5), n71=7)


class Few(Pictures):
    classes = ["one", "two"]


def too_many_labels():
    return Few(), Few()


def other_classes():
    return Pictures(), Few()


class Breaks(Pictures):
    broken = 61

    def __getitem__(self, number):
        if number == self.broken:
            raise KeyError("no such file")
        return super().__getitem__(number)


def breaks():
    return Breaks(0, 64), Breaks(64, 96)


class Stream(IterableDataset):
    def __iter__(self):
        return iter([])


def streams():
    return Stream(), Stream()


def alone():
    return Pictures()


def mapping():
    return {"train": Pictures(), "test": Pictures()}


def empty():
    return [], Pictures()


def empty_test():
    return Pictures(), []


def classes_by_target(n: int = 0):
    train = Pictures(0, 64)
    train.classes = None
    train.targets = [3] * 64
    return train, train


def grayless():
    return items(n0=(torch.zeros(1, 8, 9, dtype=torch.uint8), 0))
"""


@pytest.fixture(scope="module", autouse=True)
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with own_package(tmp_path_factory.mktemp("own"), "ownimages", more=MORE):
        yield


def made(name: str, **options: object) -> OwnImages:
    given = {"name": "mine", "batch_size": 16, "workers": 0, **options}
    return OwnImages(builder=BuilderPath(f"ownimages.{name}"), **given)  # type: ignore[arg-type]


def ready(name: str, **options: object) -> OwnImages:
    data = made(name, **options)
    data.setup()
    return data


def epoch(data: OwnImages, number: int = 0) -> list[Batch]:
    loader = data.train_dataloader()
    loader.set_epoch(number)
    return list(loader)


def by_number(batches: list[Batch]) -> dict[int, Tensor]:
    return {int(n): image for batch in batches for n, image in zip(batch.index, batch.image, strict=True)}


def test_pil_images_bytes_and_floats_become_the_same_pixels() -> None:
    gray = np.arange(16, dtype=np.uint8).reshape(4, 4)
    color = np.stack([gray, gray + 1, gray + 2], axis=2)
    for image in (Image.fromarray(gray), gray, torch.from_numpy(gray), torch.from_numpy(gray)[None], gray[..., None]):
        assert np.array_equal(pixels_of(image).numpy(), gray[..., None])
    for image in (Image.fromarray(color), color, color.transpose(2, 0, 1), torch.from_numpy(color).permute(2, 0, 1)):
        assert np.array_equal(pixels_of(image).numpy(), color)
    small = torch.arange(27, dtype=torch.uint8).view(3, 3, 3)
    assert torch.equal(pixels_of(small), small.permute(1, 2, 0)), "a tensor has its channels first"
    assert torch.equal(pixels_of(small.numpy()), small), "and an array last, where both may be meant"
    half = torch.rand(3, 4, 4, dtype=torch.float64)
    assert torch.equal(pixels_of(half), half.float())


@pytest.mark.parametrize(
    ("item", "line"),
    [
        (5, "must be a pair .* got a value of type int"),
        ((1, 2, 3), "must be a pair .* got 3 values"),
        ((np.zeros((4, 5), np.uint8), 0), r"must be square, .* got \(4, 5\)"),
        ((torch.zeros(1, 4, 5), 0), r"a float image must be square, \(C, H, W\), got \(1, 4, 5\)"),
        ((np.zeros((4, 4)), 0), "a value of type ndarray of float64"),
        ((torch.zeros(1, 4, 4, dtype=torch.int64), 0), "a value of type Tensor of torch.int64"),
        ((np.zeros((4, 4), np.uint8), 1.0), "the label must be the number of a class, got 1.0 of type float"),
        ((np.zeros((4, 4), np.uint8), True), "got True of type bool"),
        ((np.zeros((4, 4), np.uint8), torch.tensor([1, 0])), "the number of a class"),
    ],
)
def test_other_items_are_refused(item: object, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        item_of(item)


@pytest.mark.parametrize("label", [3, np.int32(3), np.array(3), torch.tensor(3), torch.tensor([3], dtype=torch.uint8)])
def test_labels_are_integers_of_any_kind(label: object) -> None:
    assert item_of((np.zeros((4, 4), np.uint8), label)).label == 3


def test_facts_are_found() -> None:
    info = ready("images.pictures").info
    assert (info.name, info.num_classes, info.in_channels, info.image_size) == ("mine", 10, 1, 8)
    assert (info.train_size, info.test_size, info.kind) == (64, 32, "streaming")
    assert info.classes[3] == "digit 3"
    assert 0.4 < info.mean[0] < 0.6 and 0.2 < info.std[0] < 0.4, "those of uniform noise"
    assert ready("images.split").info.classes == ()


def test_bytes_are_normalized_and_augmented_as_resident_images() -> None:
    data = ready("images.pictures", crop_padding=2, flip=True, seed=3)
    pixels = torch.stack([pixels_of(data._train.dataset[n][0]) for n in range(64)])  # type: ignore[index]
    for batch in epoch(data, 5):
        cropped = random_crop_flip(pixels, batch.index, seed=3, epoch=5, padding=2, flip=True)
        assert torch.equal(batch.image, normalize(cropped, data.info.mean, data.info.std, channels_last=True))
    (tests,) = data.test_dataloader()
    assert torch.equal(tests.index, torch.arange(32))
    assert not torch.equal(by_number(epoch(data, 5))[7], by_number(epoch(data, 6))[7])
    plain = by_number(data.calibration_batches(2))
    expected = normalize(pixels, data.info.mean, data.info.std, channels_last=True)
    assert len(plain) == 32 and all(torch.equal(image, expected[n]) for n, image in plain.items())


def test_floats_are_taken_as_they_are() -> None:
    data = ready("images.floats")
    assert (data.info.mean, data.info.std) == ((0.0,), (1.0,))
    for number, image in by_number(epoch(data)).items():
        assert torch.equal(image, data._train.dataset[number][0])  # type: ignore[index]
    stated = ready("images.floats", mean=[0.5], std=[0.5])
    assert (stated.info.mean, stated.info.std) == ((0.5,), (0.5,))


def test_a_random_split_is_the_same_for_each_seed_and_leaves_random_numbers_alone() -> None:
    state = torch.get_rng_state()
    first, second = ready("images.split", seed=1), ready("images.split", seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    for one, other in zip(first.test_dataloader(), second.test_dataloader(), strict=True):
        assert torch.equal(one.image, other.image) and torch.equal(one.target, other.target)
    assert first.identity()["content"] == second.identity()["content"]
    assert first.info.test_size == 24
    assert ready("images.split", options={"share": 0.5}).identity()["content"] != first.identity()["content"]


@pytest.mark.parametrize("workers", [0, 2])
def test_random_numbers_of_a_dataset_are_a_function_of_seed_epoch_and_number(workers: int) -> None:
    reference = [by_number(epoch(ready("images.noisy", seed=1), e)) for e in (0, 1)]
    data = ready("images.noisy", seed=1, workers=workers)
    loader = data.train_dataloader()
    loader.set_epoch(1)
    again = by_number(list(loader))
    assert all(torch.equal(image, again[n]) for n, image in reference[1].items())
    assert any(not torch.equal(image, reference[0][n]) for n, image in reference[1].items())
    tests = [batch.image for batch in data.test_dataloader()]
    other = [batch.image for batch in ready("images.noisy", seed=2).test_dataloader()]
    assert all(map(torch.equal, tests, other)), "test images depend on no seed of the run"


def test_a_loader_resumes_within_an_epoch() -> None:
    whole = epoch(ready("images.noisy", flip=True), 2)
    loader = ready("images.noisy", flip=True).train_dataloader()
    loader.set_epoch(2)
    running = iter(loader)
    next(running)
    resumed = ready("images.noisy", flip=True).train_dataloader()
    resumed.load_state_dict(loader.state_dict())
    resumed.set_epoch(2)
    rest = list(resumed)
    assert len(rest) == len(whole) - 1
    assert all(torch.equal(a.image, b.image) for a, b in zip(rest, whole[1:], strict=True))


def test_labels_at_hand_are_taken_without_reading_items() -> None:
    labelled = TensorDataset(torch.zeros(4, 1, 8, 8), torch.tensor([0, 1, 2, 5]))
    assert known_labels(Subset(labelled, [3, 0])).tolist() == [5, 0]  # type: ignore[union-attr]
    assert known_labels([(1, 2)]) is None
    assert known_labels(TensorDataset(torch.zeros(4), torch.zeros(4))) is None, "floats are no labels"
    assert ready("more.classes_by_target", num_classes=10).info.num_classes == 10

    class Remaps:
        targets = (0, 1)
        target_transform = staticmethod(lambda label: label + 5)

        def __len__(self) -> int:
            return 2

    assert known_labels(Remaps()) is None, "they are not the labels of the items"
    assert class_names(Subset(labelled, [0])) == ()


def test_without_names_and_labels_at_hand_all_items_are_read(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="qtrain"):
        assert ready("more.items").info.num_classes == 3
    assert "ownimages.more.items: training: reading all 80 items once, for the labels" in caplog.text
    caplog.clear()
    with caplog.at_level("INFO", logger="qtrain"):
        assert ready("more.items", num_classes=4).info.num_classes == 4
    assert "reading all" not in caplog.text


REFUSED = {
    "alone": r"must return two datasets .* got a value of type Pictures",
    "mapping": r"must return two datasets .* got a value of type dict",
    "streams": r"must return two datasets .* got \(Stream, Stream\)",
    "empty": r"ownimages\.more\.empty: training set is empty",
    "empty_test": r"ownimages\.more\.empty_test: test set is empty",
    "differing": r"1 of 120 items cannot be used: .* training item 71: is 1x9x9 bytes, and the first is 1x8x8 bytes",
    "mixed": r"training item 71: is 1x8x8 floats, and the first is 1x8x8 bytes",
    "negative": r"training item 71: the label must be 0 or more, got -1",
    "fractional": r"2 of 120 items cannot be used: .*item 70: the label .* got 1\.5 .*; .*item 71: must be a pair",
    "grayless": r"training item 0: an image must be square",
    "too_many_labels": r"training item \d+: the label must be in 0\.\.1, got \d",
    "other_classes": r"training and test set must have the same classes, they differ in: digit 0",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_data_set_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(ValueError, match=REFUSED[name]) as refusal:
        ready(f"more.{name}")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_item_that_fails_later_is_named(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = made("more.breaks", workers=workers)
    breaks = import_builder(BuilderPath("ownimages.more.Breaks"))
    monkeypatch.setattr(breaks, "broken", None)
    data.setup()
    monkeypatch.setattr(breaks, "broken", 61)
    with pytest.raises(ImageError, match=r"training item 61: KeyError: 'no such file' \(more\.py, line \d+\)$"):
        epoch(data)


@pytest.mark.parametrize("workers", [0, 2])
def test_check_names_all_items_that_cannot_be_used(workers: int) -> None:
    with pytest.raises(ValueError, match=r"1 of 96 items cannot be used: .*item 61: KeyError: 'no such file'"):
        ready("more.breaks", check=True, workers=workers)
    assert ready("images.pictures", check=True).info.num_classes == 10


def test_options_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ValueError, match="images are floats, which are taken as they are; leave crop_padding 0"):
        ready("images.floats", flip=True)
    with pytest.raises(ValueError, match="num_classes is 7, but the datasets name 10"):
        ready("images.pictures", num_classes=7)
    with pytest.raises(ValueError, match="OwnImages: workers must be at least 0, got -1"):
        made("images.pictures", workers=-1)


def test_without_training_images_mean_and_std_must_be_given() -> None:
    data = made("images.pictures")
    data.test_only()
    with pytest.raises(ValueError, match=r"give data\.mean and data\.std"):
        data.setup()
    data = made("images.pictures", mean=[0.5], std=[0.25])
    data.test_only()
    data.setup()
    assert (data.info.train_size, data.info.test_size, data.info.num_classes) == (0, 32, 10)


def test_a_stream_is_not_indexed() -> None:
    class Stream(IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            return iter([])

    assert not is_indexed(Stream()) and is_indexed([1]) and not is_indexed(5)
