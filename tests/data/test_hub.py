"""Resident sets from parquet: the right pixels and labels, columns by type, the cache, errors in one line."""

from __future__ import annotations

import logging
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from qtrain.data import cache, source
from qtrain.data.hub import HubImages
from qtrain.data.parquet import ParquetImages

from .conftest import SIZE, picture, png, write_parquet


def images(root: Path, tmp_path: Path, **options: object) -> HubImages:
    options = {"name": "tiny", "batch_size": 8, "cache_dir": str(tmp_path / "cache"), **options}
    return HubImages(root=str(root), **options)  # type: ignore[arg-type]


def pixels(data: HubImages) -> torch.Tensor:
    """All test images as bytes again, undoing the normalization."""
    image = torch.cat([batch.image for batch in data.test_dataloader()])
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (data.info.mean, data.info.std))
    return ((image * std + mean) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


def test_every_pixel_and_label_arrives(parquet_root: Path, tmp_path: Path) -> None:
    data = images(parquet_root, tmp_path)
    data.setup()
    info = data.info
    assert (info.train_size, info.test_size, info.num_classes, info.in_channels) == (48, 20, 3, 3)
    assert (info.image_size, info.kind) == (SIZE, "resident")
    assert info.classes == ("class0", "class1", "class2")
    expected = np.stack([picture(n) for n in range(100, 120)])
    assert np.array_equal(pixels(data).numpy(), expected)
    targets = torch.cat([batch.target for batch in data.test_dataloader()])
    assert targets.tolist() == [n % 3 for n in range(100, 120)]


def test_statistics_come_from_the_training_images(parquet_root: Path, tmp_path: Path) -> None:
    data = images(parquet_root, tmp_path)
    data.setup()
    whole = np.stack([picture(n) for n in range(48)]).astype(np.float64) / 255
    assert data.info.mean == pytest.approx(whole.mean((0, 1, 2)))
    assert data.info.std == pytest.approx(whole.std((0, 1, 2)))


def test_gray_images_have_one_channel(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}.parquet", range(10), image="image", gray=True)
    data = images(tmp_path, tmp_path)
    data.setup()
    assert data.info.in_channels == 1
    assert np.array_equal(pixels(data)[..., 0].numpy(), np.stack([picture(n, gray=True) for n in range(10)]))


def test_plain_parquet_without_the_librarys_metadata(tmp_path: Path) -> None:
    """Columns of bytes and integers, as another writer stores them."""
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"picture": [{"bytes": png(picture(n))} for n in range(10)], "y": [n % 2 for n in range(10)]})
    for split in ("train", "test"):
        pyarrow.parquet.write_table(table, tmp_path / f"{split}.parquet")
    data = images(tmp_path, tmp_path)
    data.setup()
    assert (data.info.num_classes, data.info.classes) == (2, ())
    assert np.array_equal(pixels(data).numpy(), np.stack([picture(n) for n in range(10)]))


def test_second_run_reads_the_cache(parquet_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images(parquet_root, tmp_path).setup()
    monkeypatch.setattr(source, "decode_images", lambda *_: pytest.fail("decoded although cached"))
    data = images(parquet_root, tmp_path)
    data.setup()
    assert (data.info.test_size, data.info.classes) == (20, ("class0", "class1", "class2"))


@pytest.mark.parametrize("damage", ["truncate", "flip", "foreign"])
def test_damaged_cache_is_made_anew(
    damage: str, parquet_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images(parquet_root, tmp_path).setup()
    (file,) = (tmp_path / "cache").glob("tiny-test-*.npz")
    whole = bytearray(file.read_bytes())
    if damage == "truncate":
        file.write_bytes(whole[: len(whole) // 2])
    elif damage == "flip":
        whole[len(whole) // 3] ^= 1
        file.write_bytes(whole)
    else:
        file.write_bytes(b"something else")
    data = images(parquet_root, tmp_path)
    with caplog.at_level(logging.WARNING):
        data.setup()
    assert "is damaged" in caplog.text
    assert np.array_equal(pixels(data).numpy(), np.stack([picture(n) for n in range(100, 120)]))
    assert cache._read(file) is not None


def test_changed_source_is_decoded_again(parquet_root: Path, tmp_path: Path) -> None:
    images(parquet_root, tmp_path).setup()
    write_parquet(parquet_root / "test-00000-of-00001.parquet", range(200, 207))
    data = images(parquet_root, tmp_path)
    data.setup()
    assert data.info.test_size == 7


def test_unwritable_cache_only_warns(parquet_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    data = images(parquet_root, tmp_path)
    with caplog.at_level(logging.WARNING):
        data.setup()
    assert "cannot keep the decoded images" in caplog.text and data.info.train_size == 48


def test_limits_keep_a_fixed_choice(parquet_root: Path, tmp_path: Path) -> None:
    data = images(parquet_root, tmp_path, max_train=16, max_test=5)
    data.setup()
    assert (data.info.train_size, data.info.test_size) == (16, 5)
    again = images(parquet_root, tmp_path, max_train=16, max_test=5, seed=3)
    again.setup()
    assert torch.equal(pixels(data), pixels(again))


def two_labels(root: Path) -> None:
    names = datasets.ClassLabel(names=["a", "b"])
    features = datasets.Features({"img": datasets.Image(), "fine_label": names, "coarse_label": names})
    rows = {"img": [{"bytes": png(picture(0)), "path": None}], "fine_label": [1], "coarse_label": [0]}
    for split in ("train", "test"):
        datasets.Dataset.from_dict(rows, features=features).to_parquet(root / f"{split}.parquet")


def test_two_label_columns_need_label_column(tmp_path: Path) -> None:
    two_labels(tmp_path)
    with pytest.raises(ValueError, match=r"one label column, found fine_label, coarse_label .* say data\.label_column"):
        images(tmp_path, tmp_path).setup()
    data = images(tmp_path, tmp_path, label_column="fine_label")
    data.setup()
    assert next(iter(data.test_dataloader())).target.tolist() == [1]


def test_missing_and_foreign_files_are_named(parquet_root: Path, tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"data\.root: there is no folder .*nowhere; give one that holds train-"
    ):
        images(tmp_path / "nowhere", tmp_path).setup()
    with pytest.raises(
        FileNotFoundError, match=r"no validation\*\.parquet in .*\(found test-00000-of-00001\.parquet, "
    ):
        images(parquet_root, tmp_path, test_split="validation").setup()
    with pytest.raises(ValueError, match=r"data\.label_column: tiny \(train\) has no column 'y'; it has img, label"):
        images(parquet_root, tmp_path, label_column="y").setup()
    (parquet_root / "train-00001-of-00002.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"data\.root: cannot read .* as parquet"):
        images(parquet_root, tmp_path).setup()
    with pytest.raises(ValueError, match=r"give data\.root=<folder of parquet files> or data\.hub="):
        HubImages(name="nothing")


def test_undecodable_images_hidden_labels_and_mixed_sizes_are_refused(tmp_path: Path) -> None:
    features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})
    broken = {
        r"tiny \(train\) image 1: cannot decode it": ([png(picture(0)), b"not an image"], [0, 1]),
        r"labels must be in 0\.\..*published test sets often hide theirs": ([png(picture(0))] * 2, [-1, -1]),
        r"must all have one size, got \[\(5, 4\), \(12, 12\)\]": ([png(picture(0)), png(picture(0)[:5, :4])], [0, 1]),
    }
    for message, (content, labels) in broken.items():
        rows = {"img": [{"bytes": c, "path": None} for c in content], "label": labels}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
        with pytest.raises(ValueError, match=message):
            images(tmp_path, tmp_path).setup()


def test_rows_of_the_hub_are_decoded_again_only_where_they_changed(
    parquet_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def from_hub(hub: str, split: str) -> datasets.Dataset:
        return source.open_large(source.parquet_files(str(parquet_root), split), str(tmp_path / "datasets"))

    def setup() -> HubImages:
        data = HubImages(name="tiny", hub="us/tiny", batch_size=8, cache_dir=str(tmp_path / "cache"))
        data.setup()
        return data

    decoded: list[str] = []
    decode = source.decode_images
    monkeypatch.setattr(source, "open_hub", from_hub)
    monkeypatch.setattr(
        source, "decode_images", lambda labeled, where: (decoded.append(where), decode(labeled, where))[1]
    )
    setup()
    setup()
    assert decoded == ["tiny (train)", "tiny (test)"]
    write_parquet(parquet_root / "test-00000-of-00001.parquet", range(200, 220))
    assert np.array_equal(pixels(setup()).numpy(), np.stack([picture(n) for n in range(200, 220)]))
    assert decoded == ["tiny (train)", "tiny (test)", "tiny (test)"]


def test_hub_without_network_gives_a_remedy(tmp_path: Path) -> None:
    data = HubImages(name="cifar10", hub="nobody/no-such-set", cache_dir=str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"data\.hub: cannot load 'nobody/no-such-set' .* give data\.root="):
        data.setup()


def test_real_cifar10(shared_data: Path, tmp_path: Path) -> None:
    """The test images' own statistics are near the published ones of the training images."""
    files = source.parquet_files(str(shared_data / "cifar10"), "test")
    rows = source.open_small(files).select(range(300))
    labeled = source.find_columns(rows, image=None, label=None, where="cifar10")
    assert (labeled.image, labeled.label, labeled.num_classes) == ("img", "label", 10)
    decoded = source.decode_images(labeled, "cifar10")
    assert decoded.shape == (300, 32, 32, 3)
    assert (decoded / 255).mean((0, 1, 2)) == pytest.approx([0.4914, 0.4822, 0.4465], abs=0.03)
    assert len(source.targets_of(labeled, "cifar10")) == 300


def test_parts_that_name_classes_in_another_order_are_refused(tmp_path: Path) -> None:
    for split, names in (("train", ["black", "white"]), ("test", ["white", "black"])):
        features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=names)})
        rows = {"img": [{"bytes": png(picture(0)), "path": None}] * 2, "label": [0, 1]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{split}.parquet")
    message = "class 0 is 'black' among the training images and 'white' among the test images"
    with pytest.raises(ValueError, match=message):
        images(tmp_path, tmp_path).setup()
    with pytest.raises(ValueError, match=message):
        ParquetImages(name="tiny", root=str(tmp_path), test_split="test", image_size=12).setup()


def test_a_part_without_rows_is_said(parquet_root: Path, tmp_path: Path) -> None:
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    datasets.Dataset.from_dict({"img": [], "label": []}, features=features).to_parquet(parquet_root / "empty.parquet")
    with pytest.raises(ValueError, match=r"tiny \(empty\): there are no rows"):
        images(parquet_root, tmp_path, test_split="empty").setup()
