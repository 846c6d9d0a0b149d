"""Which image files a user's folders, files and patterns name, and how they are loaded."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from qtrain.data.file_loader import file_batches
from qtrain.data.image_files import find_images

from .conftest import picture


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Some images, and files that are none, below the working directory."""
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(
        ("b.PNG", "a.jpg", "deep/c.png", ".hidden/d.png", ".e.png", "deep/notes.txt", "f.gif")
    ):
        file = tmp_path / "photos" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(number)).save(file, "PNG")
    return tmp_path / "photos"


@pytest.mark.parametrize(
    ("places", "found"),
    [
        (["photos"], ["photos/a.jpg", "photos/b.PNG", "photos/deep/c.png"]),
        (["photos/f.gif", "photos/deep/notes.txt"], ["photos/f.gif", "photos/deep/notes.txt"]),
        (["photos/*.[jP]*"], ["photos/a.jpg", "photos/b.PNG"]),
        (["photos/**/*.png"], ["photos/deep/c.png"]),
        (["ph*"], ["photos/a.jpg", "photos/b.PNG", "photos/deep/c.png"]),
        (["photos/deep", "photos"], ["photos/deep/c.png", "photos/a.jpg", "photos/b.PNG"]),
        (["~/b.PNG"], ["HOME/b.PNG"]),
    ],
)
def test_folders_files_and_patterns(
    photos: Path, monkeypatch: pytest.MonkeyPatch, places: list[str], found: list[str]
) -> None:
    monkeypatch.setenv("HOME", str(photos))
    assert find_images(places) == [name.replace("HOME", str(photos)) for name in found]


def test_a_file_that_is_there_is_no_pattern(photos: Path) -> None:
    (photos / "a.jpg").rename(photos / "a[1].jpg")
    assert find_images(["photos/a[1].jpg"]) == ["photos/a[1].jpg"]


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("photos/.hidden", None),
        ("empty", r"the folder empty has no image, also not in its subfolders \(\.jpg, "),
        ("nowhere", "there is no file or folder nowhere"),
        ("photos/*.bmp", r"no image matches photos/\*\.bmp"),
    ],
)
def test_a_place_without_an_image_is_named(photos: Path, place: str, message: str | None) -> None:
    Path("empty").mkdir()
    if message is None:
        assert find_images([place]) == [os.path.join(place, "d.png")], "what is named is taken"
        return
    with pytest.raises(FileNotFoundError, match=message):
        find_images(["photos", place])


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_keep_the_order_and_name_what_is_unreadable(tmp_path: Path, workers: int) -> None:
    files = [str(tmp_path / f"{number}.png") for number in range(5)]
    for number, file in enumerate(files):
        Image.fromarray(picture(number)).save(file)
    Path(files[1]).write_bytes(b"no image")
    Path(files[4]).unlink()
    batches = list(file_batches(files, pil_to_tensor, batch_size=2, workers=workers))
    assert [batch.paths for batch in batches] == [files[:1], files[2:4], []]
    assert [[error.where for error in batch.unreadable] for batch in batches] == [[files[1]], [], [files[4]]]
    assert next(error.reason for batch in batches for error in batch.unreadable) == "no known image format"
    expected = np.stack([picture(number) for number in (2, 3)])
    assert np.array_equal(batches[1].image.permute(0, 2, 3, 1).numpy(), expected)


def test_an_image_that_cannot_be_resized_is_unreadable(tmp_path: Path) -> None:
    file = str(tmp_path / "long.png")
    Image.fromarray(picture(0)).save(file)

    def resized(image: Image.Image) -> Tensor:
        raise MemoryError

    (batch,) = list(file_batches([file], resized, batch_size=1, workers=0))
    assert (batch.paths, len(batch.image)) == ([], 0)
    assert [str(error) for error in batch.unreadable] == [
        f"{file}: cannot decode it (cannot be resized: MemoryError); repair or remove it"
    ]


def test_loading_files_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    file = str(tmp_path / "a.png")
    Image.fromarray(picture(0)).save(file)
    before = torch.get_rng_state()
    list(file_batches([file], pil_to_tensor, batch_size=1, workers=0))
    assert torch.equal(torch.get_rng_state(), before)


def test_links_in_a_circle_and_to_folders_above_count_once(photos: Path) -> None:
    (photos / "deep" / "loop").symlink_to(photos / "deep", target_is_directory=True)
    (photos / "deep" / "up").symlink_to(photos, target_is_directory=True)
    outside = photos.parent / "elsewhere"
    outside.mkdir()
    Image.fromarray(picture(9)).save(outside / "z.png")
    (photos / "linked").symlink_to(outside, target_is_directory=True)
    names = ["photos/a.jpg", "photos/b.PNG", "photos/deep/c.png", "photos/linked/z.png"]
    assert find_images(["photos"]) == names
