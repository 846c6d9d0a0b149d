"""Image files in one folder for each class, the layout of ImageNet on disk; streaming."""

import os
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from qtrain.data.decode import read_image
from qtrain.data.image_files import images_below
from qtrain.data.image_set import REPAIR_OR_CHECK, ImageSet
from qtrain.data.streaming import StreamingData


class FolderImages(ImageSet):
    """The images below ``folder``/<class>/, also in subfolders; classes are numbered in the order of their names.

    ``option`` is the key that names the folder, for messages. Files and folders whose names begin with a dot are left
    out: file managers and notebooks leave such. Raises ``FileNotFoundError`` where there is no folder, or none of a
    class, and where a class has no image.
    """

    def __init__(self, folder: Path, *, option: str) -> None:
        if not folder.is_dir():
            found = ", ".join(_folders(folder.parent)) if folder.parent.is_dir() else ""
            there = f"; {folder.parent} has {found}: say {option}=<one of them>" if found else ""
            raise FileNotFoundError(
                f"data.root: there is no folder {folder}; its subfolders must be the classes{there}"
            )
        self.classes = tuple(_folders(folder))
        if not self.classes:
            raise FileNotFoundError(f"data.root: {folder} must hold one folder of images for each class, and has none")
        self.num_classes = len(self.classes)
        self._folder = folder
        found_files = [images_below(folder / name) for name in self.classes]
        if empty := [name for name, files in zip(self.classes, found_files, strict=True) if not files]:
            raise FileNotFoundError(
                f"data.root: {folder} must hold one folder of images for each class, and {len(empty)} have no image: "
                f"{', '.join(empty[:5])}; remove them, or add images ({', '.join(IMG_EXTENSIONS)})"
            )
        self._samples = [(file, target) for target, files in enumerate(found_files) for file in files]

    def __len__(self) -> int:
        return len(self._samples)

    def image(self, number: int) -> Image.Image:
        path = self._samples[number][0]
        return read_image(path, path, remedy=REPAIR_OR_CHECK)

    def target(self, number: int) -> int:
        return self._samples[number][1]

    def where(self, number: int) -> str:
        return self._samples[number][0]

    def fingerprint(self) -> str:
        digest = sha256(str(self._folder.resolve()).encode())
        for path, _ in self._samples:
            digest.update(f"\0{path}\0{_state(path)}".encode())
        return digest.hexdigest()[:24]


def _folders(parent: Path) -> list[str]:
    with os.scandir(parent) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _state(path: str) -> str:
    try:
        status = os.stat(path)
    except OSError as error:  # a link to nowhere
        return str(error.errno)
    return f"{status.st_size} {status.st_mtime_ns}"


@dataclass(kw_only=True, eq=False, repr=False)
class ImageFolder(StreamingData):
    """``root``/``train_folder``/<class>/<image> and ``root``/``test_folder``/<class>/<image>."""

    root: str
    train_folder: str = "train"
    test_folder: str = "val"

    def _train_images(self) -> FolderImages:
        return FolderImages(Path(self.root).expanduser() / self.train_folder, option="data.train_folder")

    def _test_images(self) -> FolderImages:
        return FolderImages(Path(self.root).expanduser() / self.test_folder, option="data.test_folder")

    def _check_classes(self, train: ImageSet, test: ImageSet) -> None:
        assert isinstance(train, FolderImages) and isinstance(test, FolderImages)
        if train.classes != test.classes:
            odd = sorted(set(train.classes) ^ set(test.classes))
            raise ValueError(
                f"{self.name}: {self.train_folder} and {self.test_folder} must have the same classes, "
                f"{len(odd)} are in one only: {', '.join(odd[:5])}; check data.root={self.root}"
            )
