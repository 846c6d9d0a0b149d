"""Labeled images at random access, and what a few of them tell about all."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple, final

import numpy as np
from PIL import Image

SAMPLED = 64
"""Number of images, spread evenly, that are looked at to learn about a set or to tell it from others."""
SMALL = 64
"""Side of the largest image, in pixels, that counts as small."""


REPAIR = "repair or remove it"
REPAIR_OR_CHECK = f"{REPAIR} (data.check=true finds all such images, data.on_error=skip leaves them out)"


class ImageError(ValueError):
    """An image that cannot be used; the message is one line and names it."""


@final
class UnreadableImageError(ImageError):
    """An image that cannot be decoded: ``where`` it is, for what ``reason``, and what to do.

    ``errno`` is the code of the operating system where it did not give the file, else ``None``.
    """

    def __init__(self, where: str, reason: str, remedy: str, errno: int | None = None) -> None:
        super().__init__(where, reason, remedy, errno)  # all arguments, which pickling needs
        self.where = where
        self.reason = reason
        self.remedy = remedy
        self.errno = errno

    def __str__(self) -> str:
        return f"{self.where}: cannot decode it ({self.reason}); {self.remedy}"


class ImageSet(ABC):
    """Labeled images at random access; must be cheap to copy into a worker process."""

    num_classes: int
    classes: tuple[str, ...] = ()
    """Names of the classes in order; empty where they have none."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def image(self, number: int) -> Image.Image:
        """Decode one image, as ``qtrain.data.decode`` does; raises :class:`UnreadableImageError`."""

    @abstractmethod
    def target(self, number: int) -> int:
        """Its class."""

    @abstractmethod
    def where(self, number: int) -> str:
        """What a message calls it: its file, or its row."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A short text that changes with the files: their names, sizes and times. Decodes nothing."""


@final
class NoImages(ImageSet):
    """Stands in for training images that are not read."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes

    def __len__(self) -> int:
        return 0

    def image(self, number: int) -> Image.Image:
        raise IndexError(number)

    def target(self, number: int) -> int:
        raise IndexError(number)

    def where(self, number: int) -> str:
        raise IndexError(number)

    def fingerprint(self) -> str:
        return "none"


@final
class SomeImages(ImageSet):
    """The images ``numbers`` of another set, numbered anew from 0."""

    def __init__(self, images: ImageSet, numbers: Sequence[int]) -> None:
        self.num_classes, self.classes = images.num_classes, images.classes
        self._images = images
        self._numbers = np.asarray(numbers, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._numbers)

    def image(self, number: int) -> Image.Image:
        return self._images.image(int(self._numbers[number]))

    def target(self, number: int) -> int:
        return self._images.target(int(self._numbers[number]))

    def where(self, number: int) -> str:
        return self._images.where(int(self._numbers[number]))

    def fingerprint(self) -> str:
        return f"{len(self)} of {self._images.fingerprint()}"


def sampled(images: ImageSet) -> list[int]:
    """The numbers of up to ``SAMPLED`` images, spread evenly over the set."""
    count = len(images)
    numbers: list[int] = np.linspace(0, count - 1, min(count, SAMPLED)).astype(int).tolist()
    return numbers


class Looks(NamedTuple):
    """What the sampled images of a set have in common.

    ``side`` is their width and height in pixels where all are squares of one size and small, else ``None``. ``gray``:
    all have one channel. ``colorless``: no pixel of any has a color, whatever the number of channels.
    """

    side: int | None
    gray: bool
    colorless: bool


def looks_of(images: ImageSet) -> Looks:
    """Look at the sampled images, at no more than it takes: of photographs at the first."""
    sizes: set[tuple[int, int]] = set()
    gray = colorless = True
    for number in sampled(images):
        image = images.image(number)
        sizes.add(image.size)
        gray = gray and image.mode == "L"
        colorless = colorless and (image.mode == "L" or not np.ptp(np.asarray(image), axis=2).any())
        if not (colorless or gray or _side(sizes)):
            break
    return Looks(_side(sizes), gray and bool(sizes), colorless and bool(sizes))


def _side(sizes: set[tuple[int, int]]) -> int | None:
    if len(sizes) != 1:
        return None
    ((width, height),) = sizes
    return width if width == height <= SMALL else None
