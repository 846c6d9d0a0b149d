"""Folders and parquet as streams: every image arrives, augmentation is a function of the sample, errors are named."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from qtrain.data.augment import mix, plan_mix
from qtrain.data.folder import ImageFolder
from qtrain.data.parquet import ParquetImages
from qtrain.data.streaming import IMAGENET_MEAN, StreamingData
from qtrain.data.streaming_loader import Collate, seeded
from qtrain.spec import Batch

from .conftest import SIZE, picture

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "crop_pct": 1.0, "image_size": SIZE}


def parquet(root: Path, **options: object) -> StreamingData:
    options = {"batch_size": 8, "workers": 0, "image_size": SIZE, "cache_dir": str(root / "mapped"), **options}
    data = ParquetImages(name="tiny", root=str(root), test_split="test", **options)  # type: ignore[arg-type]
    data.setup()
    return data


def folder(root: Path, **options: object) -> StreamingData:
    options = {"batch_size": 8, "workers": 0, "image_size": SIZE, **options}
    data = ImageFolder(name="tiny", root=str(root), **options)  # type: ignore[arg-type]
    data.setup()
    return data


def check_test_images(data: StreamingData, numbers: list[int], classes: int) -> None:
    image = torch.cat([b.image for b in data.test_dataloader()])
    target = torch.cat([b.target for b in data.test_dataloader()])
    expected = np.stack([picture(n) for n in numbers])
    assert np.array_equal((image * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy(), expected)
    assert target.tolist() == [n % classes for n in numbers]


def test_parquet_gives_every_pixel_and_label(parquet_root: Path) -> None:
    data = parquet(parquet_root, **PLAIN)
    assert (data.info.train_size, data.info.test_size, data.info.num_classes, data.info.kind) == (
        48,
        20,
        3,
        "streaming",
    )
    check_test_images(data, list(range(100, 120)), classes=3)
    assert data.info.classes == ("class0", "class1", "class2")


def test_folder_gives_every_pixel_and_label(folder_root: Path) -> None:
    data = folder(folder_root, **PLAIN)
    assert (data.info.train_size, data.info.test_size, data.info.num_classes) == (24, 8, 2)
    check_test_images(data, [100, 102, 104, 106, 101, 103, 105, 107], classes=2)
    assert data.info.classes == ("class0", "class1")


def test_batches_do_not_depend_on_the_number_of_workers(parquet_root: Path) -> None:
    """Random augmentation, erasing and mixing included; two epochs, since training workers live on."""
    options = {"auto_augment": "rand-m9-mstd0.5", "re_prob": 0.5, "mixup": 0.4, "cutmix": 1.0}
    loaders = [parquet(parquet_root, workers=workers, **options).train_dataloader() for workers in (0, 2)]
    epochs = []
    for epoch in range(2):
        for loader in loaders:
            loader.set_epoch(epoch)
        here, there = (list(loader) for loader in loaders)
        assert len(here) == 6
        for a, b in zip(here, there, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
            assert a.image.is_contiguous(memory_format=torch.channels_last) and a.target.shape == (8, 3)
        epochs.append({int(i): x for b in here for i, x in zip(b.index, b.image, strict=True)})
    assert not any(torch.equal(epochs[0][i], epochs[1][i]) for i in epochs[0])


def test_reading_leaves_the_global_generators_alone(parquet_root: Path) -> None:
    def states() -> tuple[object, ...]:
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[index, union-attr]

    before = states()
    list(parquet(parquet_root, auto_augment="rand-m9-mstd0.5", re_prob=1.0).train_dataloader())
    assert states() == before
    with seeded(1):
        first = (random.random(), np.random.rand(), torch.rand(()).item())
        assert states() != before
    with seeded(1):
        assert (random.random(), np.random.rand(), torch.rand(()).item()) == first
    assert states() == before


def test_seed_changes_augmentation_and_mean_defaults_to_imagenets(parquet_root: Path) -> None:
    data = parquet(parquet_root, batch_size=48)
    assert data.info.mean == IMAGENET_MEAN
    (a,), (b,) = (list(parquet(parquet_root, batch_size=48, seed=seed).train_dataloader()) for seed in (0, 1))
    a, b = (batch.image[batch.index.argsort()] for batch in (a, b))
    assert not torch.equal(a, b)


def test_validation_and_calibration_are_plain_training_images(parquet_root: Path) -> None:
    data = parquet(parquet_root, val_fraction=0.25, auto_augment="rand-m9-mstd0.5", **PLAIN)
    val = list(data.val_dataloader())  # type: ignore[arg-type]
    calibration = data.calibration_batches(2)
    numbers = torch.cat([b.index for b in val])
    assert len(numbers) == 12 and not set(numbers.tolist()) & {int(i) for b in calibration for i in b.index}
    for batch in [*val, *calibration]:
        for number, image in zip(batch.index.tolist(), batch.image, strict=True):
            assert np.array_equal((image * 255).round().byte().permute(1, 2, 0).numpy(), picture(number))


def test_wrong_places_are_named(folder_root: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data\.root: there is no folder .*nowhere/train; its subfolders must"):
        folder(tmp_path / "nowhere")
    (tmp_path / "empty" / "train").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"empty/train must hold one folder of images for each class"):
        folder(tmp_path / "empty")
    (folder_root / "val" / "class1").rename(folder_root / "val" / "other")
    with pytest.raises(ValueError, match=r"the same classes, 2 are in one only: class1, other; check data\.root"):
        folder(folder_root)


def test_broken_image_is_named(folder_root: Path) -> None:
    (folder_root / "val" / "class0" / "100.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"val/class0/100\.png: cannot decode it"):
        list(folder(folder_root).test_dataloader())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0}, "ImageFolder: image_size must be at least 1, got 0; in pixels"),
        ({"crop_pct": 1.5}, r"ImageFolder: crop_pct must be in \(0, 1\], got 1.5"),
        ({"re_prob": 2.0}, r"ImageFolder: re_prob must be in \[0, 1\], got 2.0"),
        ({"workers": -1}, "ImageFolder: workers must be at least 0, got -1; 0 decodes in the main process"),
    ],
)
def test_wrong_options_give_a_one_line_error(options: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        folder(tmp_path, **options)


def test_pairs_of_streamed_samples_mix_by_the_shares_of_their_epoch() -> None:
    images = torch.rand(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    numbers, targets = torch.tensor([7, 2, 5, 0]), torch.tensor([1, 0, 2, 2])
    samples = [(image, int(t), int(n), 3) for image, t, n in zip(images, targets, numbers, strict=True)]
    batch = Collate(num_classes=3, seed=1, channels_last=False, mixup=0.4, cutmix=1.0)(samples)
    assert isinstance(batch, Batch)
    plan = plan_mix(numbers[::2], seed=1, epoch=3, mixup=0.4, cutmix=1.0, height=6, width=6)
    image, target = mix(images, targets, plan, num_classes=3)
    assert torch.equal(batch.image, image) and torch.equal(batch.target, target)
    assert torch.equal(batch.index, numbers)
