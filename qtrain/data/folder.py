"""Image files in one folder for each class, the layout of ImageNet on disk; streaming."""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

from qtrain.data.streaming import ImageSet, StreamingData


class FolderImages(ImageSet):
    """The images below ``folder``/<class>/, classes numbered in the order of their names."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise FileNotFoundError(f"data.root: there is no folder {folder}; its subfolders must be the classes")
        try:
            self.classes, numbers = find_classes(str(folder))
            self._samples = make_dataset(str(folder), numbers, extensions=IMG_EXTENSIONS)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"data.root: {folder} must hold one folder of images for each class ({str(error).splitlines()[0]})"
            ) from error
        self.num_classes = len(self.classes)

    def __len__(self) -> int:
        return len(self._samples)

    def image(self, number: int) -> Image.Image:
        path = self._samples[number][0]
        try:
            image = Image.open(path)
            image.load()
        except OSError as error:
            raise ValueError(f"{path}: cannot decode it ({error}); repair or remove it") from error
        return image

    def target(self, number: int) -> int:
        target: int = self._samples[number][1]
        return target


@dataclass(kw_only=True, eq=False, repr=False)
class ImageFolder(StreamingData):
    """``root``/``train_folder``/<class>/<image> and ``root``/``test_folder``/<class>/<image>."""

    root: str
    train_folder: str = "train"
    test_folder: str = "val"

    def _train_images(self) -> FolderImages:
        return FolderImages(Path(self.root).expanduser() / self.train_folder)

    def _test_images(self) -> FolderImages:
        return FolderImages(Path(self.root).expanduser() / self.test_folder)

    def _check_classes(self, train: ImageSet, test: ImageSet) -> None:
        assert isinstance(train, FolderImages) and isinstance(test, FolderImages)
        if train.classes != test.classes:
            odd = sorted(set(train.classes) ^ set(test.classes))
            raise ValueError(
                f"{self.name}: {self.train_folder} and {self.test_folder} must have the same classes, "
                f"{len(odd)} are in one only: {', '.join(odd[:5])}; check data.root={self.root}"
            )
