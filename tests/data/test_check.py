"""Images that cannot be decoded: found before the training, left out, or named when they are met."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from PIL import Image

from qtrain.data import check, streaming
from qtrain.data.folder import FolderImages, ImageFolder
from qtrain.data.image_set import ImageError
from qtrain.data.parquet import ParquetImages
from qtrain.spec import Batch

from .conftest import SIZE

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def damaged(folder_root: Path) -> Path:
    """24 training and 8 test images, of which two and one cannot be decoded."""
    for name in ("train/class0/004.png", "train/class1/023.png", "val/class1/101.png"):
        file = folder_root / name
        file.write_bytes(file.read_bytes()[:100])
    return folder_root


def folder(root: Path, **options: object) -> ImageFolder:
    options = {"batch_size": 4, "workers": 0, **options}
    return ImageFolder(name="tiny", root=str(root), **options)  # type: ignore[arg-type]


def epoch_of(data: ImageFolder) -> list[Batch]:
    data.setup()
    return list(data.train_dataloader())


@pytest.mark.parametrize("workers", [0, 2])
def test_check_names_every_image_of_both_parts_in_one_error(damaged: Path, workers: int) -> None:
    with pytest.raises(ValueError, match=r"^tiny: 3 of 32 images cannot be decoded: ") as caught:
        folder(damaged, check=True, workers=workers).setup()
    message = str(caught.value)
    for name in ("train/class0/004.png (", "train/class1/023.png (", "val/class1/101.png ("):
        assert str(damaged / name) in message
    assert message.endswith("Repair or remove them, or leave them out by data.on_error=skip") and "\n" not in message


def test_check_of_whole_images_passes(folder_root: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = folder(folder_root, check=True)
    with caplog.at_level(logging.INFO, "qtrain"):
        data.setup()
    assert data.info.train_size == 24
    assert "tiny: all 32 images can be decoded" in caplog.text


def test_skip_leaves_them_out_counted_and_logged(damaged: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = folder(damaged, on_error="skip", image_size=SIZE, crop="none", flip=False, mean=(0.0,) * 3, std=(1.0,) * 3)
    data.setup()
    assert (data.info.train_size, data.info.test_size, data.info.num_classes) == (22, 7, 2)
    assert "tiny: 3 of 32 images cannot be decoded and are left out" in caplog.text
    assert "left out: " + str(damaged / "train/class0/004.png") in caplog.text
    left = [number for number in range(0, 24, 2) if number != 4] + [number for number in range(1, 23, 2)]
    for batch in data.train_dataloader():
        for number, target, image in zip(batch.index.tolist(), batch.target.tolist(), batch.image, strict=True):
            file = damaged / "train" / f"class{target}" / f"{left[number]:03d}.png"
            expected = torch.tensor(list(Image.open(file).tobytes())).view(SIZE, SIZE, 3).permute(2, 0, 1)
            assert torch.equal((image * 255).round().long(), expected)


def test_an_epoch_after_skipping_is_that_of_a_folder_without_the_damaged_files(damaged: Path, tmp_path: Path) -> None:
    """So it depends on nothing but the files, whichever process reads them."""
    skipping = [epoch_of(folder(damaged, on_error="skip", workers=workers)) for workers in (0, 2)]
    for name in ("train/class0/004.png", "train/class1/023.png", "val/class1/101.png"):
        (damaged / name).unlink()
    for batches in skipping:
        for one, other in zip(batches, epoch_of(folder(damaged)), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_checked_files_are_not_decoded_again_until_they_change(damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = folder(damaged, on_error="skip")
    data.setup()
    tried: list[int] = []
    decodes = check._Tried.__getitem__
    monkeypatch.setattr(check._Tried, "__getitem__", lambda self, number: tried.append(number))
    again = folder(damaged, on_error="skip")
    again.setup()
    assert again.identity()["content"] == data.identity()["content"] and not tried

    monkeypatch.setattr(check._Tried, "__getitem__", decodes)
    Image.new("RGB", (SIZE, SIZE)).save(damaged / "train/class0/004.png")
    repaired = folder(damaged, on_error="skip")
    repaired.setup()
    assert repaired.info.train_size == 23


def test_a_file_that_the_system_does_not_give_is_tried_again(folder_root: Path, cache: Path) -> None:
    link = folder_root / "train/class0/link.png"
    link.symlink_to(folder_root / "nowhere.png")
    data = folder(folder_root, on_error="skip")
    data.setup()
    assert data.info.train_size == 24
    kept = [json.loads(file.read_text()) for file in cache.glob("tiny-*-unreadable.json")]
    assert kept == [{}], "of the test images alone"


def test_damaged_record_is_made_anew(damaged: Path, cache: Path) -> None:
    folder(damaged, on_error="skip").setup()
    for file in cache.glob("tiny-*-unreadable.json"):
        file.write_text("[1")
    data = folder(damaged, on_error="skip")
    data.setup()
    assert data.info.train_size == 22


def test_unwritable_cache_costs_a_warning(damaged: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text("a file where the folder would be")
    data = folder(damaged, on_error="skip")
    data.setup()
    assert data.info.train_size == 22
    assert "cannot keep the check of tiny" in caplog.text


def test_a_class_that_would_lose_all_images_is_an_error(folder_root: Path) -> None:
    for file in (folder_root / "val" / "class1").iterdir():
        file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"no image of 1 class\(es\) can be decoded, for example .*class1/101\.png"):
        folder(folder_root, on_error="skip").setup()


@pytest.mark.parametrize("workers", [0, 1])
def test_without_a_check_the_first_one_met_is_named_in_one_line(folder_root: Path, workers: int) -> None:
    """Also from a worker process: torch's words around an exception would take many lines."""
    data = folder(folder_root, workers=workers)
    data.setup()
    (folder_root / "train/class0/004.png").write_bytes(b"")
    with pytest.raises(ImageError) as caught:
        list(data.train_dataloader())
    path = folder_root / "train/class0/004.png"
    assert str(caught.value) == (
        f"{path}: cannot decode it (no known image format); repair or remove it "
        "(data.check=true finds all such images, data.on_error=skip leaves them out)"
    )


def test_an_image_that_is_looked_at_is_named_before_anything_is_trained(folder_root: Path) -> None:
    (folder_root / "train/class0/000.png").write_bytes(b"")
    with pytest.raises(ImageError, match=r"train/class0/000\.png: cannot decode it"):
        folder(folder_root).setup()


def test_images_of_parquet_are_checked_too(parquet_root: Path) -> None:
    import datasets

    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    rows = {"img": [{"bytes": b"no image", "path": None}] * 2, "label": [0, 1]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(parquet_root / "train-00009.parquet")
    options = {"batch_size": 8, "workers": 0, "cache_dir": str(parquet_root / "mapped")}
    data = ParquetImages(name="rows", root=str(parquet_root), test_split="test", on_error="skip", **options)  # type: ignore[arg-type]
    data.setup()
    assert data.info.train_size == 48
    with pytest.raises(ValueError, match=r"rows: 2 of 70 images cannot be decoded: rows \(train\) image 48 \(no known"):
        ParquetImages(name="rows", root=str(parquet_root), test_split="test", check=True, **options).setup()  # type: ignore[arg-type]


def test_only_test_images_are_checked_where_training_images_are_not_read(damaged: Path) -> None:
    data = folder(damaged, check=True)
    data.test_only()
    with pytest.raises(ValueError, match="tiny: 1 of 8 images cannot be decoded"):
        data.setup()


def test_nodes_that_left_out_other_images_are_told(folder_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The maximum over two ranks, of which the other has all images."""
    whole = FolderImages(folder_root / "train", option="data.train_folder")
    fewer = check.SomeImages(whole, range(1, 24))
    sent: list[torch.Tensor] = []
    monkeypatch.setattr(check, "world_size", lambda: 2)
    monkeypatch.setattr(check, "largest_of_ranks", lambda pair: (sent.append(pair), pair)[1])
    check.require_same_images(whole, "tiny", torch.device("cpu"))
    monkeypatch.setattr(check, "largest_of_ranks", lambda pair: torch.maximum(pair, sent[0]))
    check.require_same_images(whole, "tiny", torch.device("cpu"))
    with pytest.raises(ValueError, match="tiny: on_error=skip left out other images on some nodes than on others"):
        check.require_same_images(fewer, "tiny", torch.device("cpu"))


@pytest.mark.parametrize(("on_error", "sizes"), [("skip", [24, 8]), ("raise", [])])
def test_each_rank_compares_what_it_left_out(
    folder_root: Path, on_error: str, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[int] = []
    monkeypatch.setattr(streaming, "require_same_images", lambda images, name, device: compared.append(len(images)))
    data = folder(folder_root, on_error=on_error)
    data.setup()
    data.trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    data.train_dataloader(), data.test_dataloader()
    assert compared == sizes


def test_a_check_draws_no_random_numbers(folder_root: Path) -> None:
    before = torch.get_rng_state()
    folder(folder_root, check=True, workers=1).setup()
    assert torch.equal(torch.get_rng_state(), before)
