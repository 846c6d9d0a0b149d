"""The items of a torch dataset that is not qtrain's: what an image and a label may be, and what they become."""

from collections.abc import Iterator, Sized
from typing import NamedTuple, Protocol, TypeGuard, final, runtime_checkable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

from qtrain.data.decode import to_8_bits
from qtrain.data.image_set import SAMPLED, ImageError
from qtrain.data.streaming_loader import Sample, seeded
from qtrain.data.workers import each_item
from qtrain.functional.random import seed_of
from qtrain.utils.user_code import explained


@runtime_checkable
class Indexed(Protocol):
    """A map-style dataset: items by number, and how many there are."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> object: ...


class Facts(NamedTuple):
    """What all items of a dataset have in common: of what ``shape`` and ``dtype`` their pixels are."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def floats(self) -> bool:
        """Whether images are normalized floats (C, H, W), taken as they are; otherwise bytes (H, W, C)."""
        return self.dtype != torch.uint8

    @property
    def channels(self) -> int:
        return self.shape[0] if self.floats else self.shape[2]

    @property
    def image_size(self) -> int:
        return self.shape[1]

    def __str__(self) -> str:
        kind = "floats" if self.floats else "bytes"
        return f"{self.channels}x{self.image_size}x{self.image_size} {kind}"


class Item(NamedTuple):
    """Pixels, (H, W, C) uint8 or (C, H, W) float32, and the number of their class."""

    pixels: Tensor
    label: int

    @property
    def facts(self) -> Facts:
        return Facts(tuple(self.pixels.shape), self.pixels.dtype)


@final
class OwnItems:
    """The items of ``dataset``, that messages call ``name``.

    An item is a function of (seed, epoch, number), although the dataset may draw random numbers: the generators of
    Python, NumPy and torch are seeded around each.
    """

    def __init__(self, dataset: Indexed, name: str) -> None:
        self.dataset = dataset
        self.name = name

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, number: int, *, seed: int = 0, epoch: int = 0) -> Item:
        """Item ``number``. Raises ``ImageError`` where it is none, or the dataset fails."""
        try:
            with seeded(seed_of(seed, epoch, number)):
                item = self.dataset[number]
        except Exception as error:
            raise ImageError(f"{self.name} item {number}: {explained(error)}") from error
        try:
            return item_of(item)
        except ValueError as error:
            raise ImageError(f"{self.name} item {number}: {error}") from error

    def checked(self, number: int, facts: Facts, num_classes: int | None, *, seed: int = 0, epoch: int = 0) -> Item:
        """As :meth:`read`, with ``ImageError`` also where the item has other ``facts``, or a label out of range."""
        item = self.read(number, seed=seed, epoch=epoch)
        if item.facts != facts:
            raise ImageError(
                f"{self.name} item {number}: is {item.facts}, and the first is {facts}; all images must be alike, so "
                "resize or convert them in the dataset"
            )
        if item.label < 0 or (num_classes is not None and item.label >= num_classes):
            limit = "0 or more" if num_classes is None else f"in 0..{num_classes - 1}"
            raise ImageError(f"{self.name} item {number}: the label must be {limit}, got {item.label}")
        return item

    def sampled(self, most: int = SAMPLED) -> list[int]:
        """The numbers of up to ``most`` items, spread evenly."""
        numbers: list[int] = np.linspace(0, len(self) - 1, min(len(self), most)).astype(int).tolist()
        return numbers

    def scan(self, facts: Facts, num_classes: int | None, *, workers: int) -> Iterator[int | ImageError]:
        """The label of each item in order, or what is wrong with it; shows progress."""
        labels, title = _Labels(self, facts, num_classes), f"reading {self.name} items"
        return each_item(labels, total=len(self), workers=workers, title=title, unit="items")


@final
class OwnSamples(Dataset[Sample | ImageError]):
    """What runs in a worker: (epoch, number) in, sample out; only training images differ from epoch to epoch."""

    def __init__(self, items: OwnItems, facts: Facts, num_classes: int, *, seed: int, train: bool) -> None:
        self._items, self._facts, self._num_classes = items, facts, num_classes
        self._seed, self._train = seed, train

    def __getitem__(self, key: tuple[int, int]) -> Sample | ImageError:
        epoch, number = key
        varied = {"seed": self._seed, "epoch": epoch} if self._train else {}
        try:
            item = self._items.checked(number, self._facts, self._num_classes, **varied)
        except ImageError as error:
            return error
        return item.pixels, item.label, number, epoch


@final
class _Labels(Dataset[int | ImageError]):
    def __init__(self, items: OwnItems, facts: Facts, num_classes: int | None) -> None:
        self._items, self._facts, self._num_classes = items, facts, num_classes

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, number: int) -> int | ImageError:
        try:
            return self._items.checked(number, self._facts, self._num_classes).label
        except ImageError as error:
            return error


def item_of(item: object) -> Item:
    """A pair (image, label) as :class:`Item`. Raises ``ValueError`` for anything else."""
    if not isinstance(item, tuple | list) or len(item) != 2:
        kind = f"{len(item)} values" if isinstance(item, tuple | list) else f"a value of type {type(item).__name__}"
        raise ValueError(f"must be a pair (image, label), got {kind}")
    image, label = item
    return Item(pixels_of(image), label_of(label))


def pixels_of(image: object) -> Tensor:
    """Pixels of a square image: (H, W, C) uint8 of one in bytes, (C, H, W) float32 of one in floats.

    - A PIL image becomes 8 bits, gray or color (``qtrain.data.decode``).
    - A uint8 array or tensor is (H, W), (H, W, C) or (C, H, W).
    - A float tensor (C, H, W) is an image that is normalized already.

    Raises ``ValueError`` for anything else.
    """
    if isinstance(image, Image.Image):
        return _bytes(torch.from_numpy(np.array(to_8_bits(image))), first_channels=False)
    if isinstance(image, np.ndarray) and image.dtype == np.uint8:
        return _bytes(torch.from_numpy(image.copy()), first_channels=False)
    if isinstance(image, Tensor) and image.dtype == torch.uint8:
        return _bytes(image.detach().as_subclass(Tensor).cpu(), first_channels=True)
    if isinstance(image, Tensor) and image.is_floating_point():
        floats = image.detach().as_subclass(Tensor).cpu().float()
        if floats.dim() != 3 or floats.shape[1] != floats.shape[2]:
            raise ValueError(f"a float image must be square, (C, H, W), got {tuple(image.shape)}; pad or resize it")
        return floats
    dtype = f" of {image.dtype}" if isinstance(image, Tensor | np.ndarray) else ""
    raise ValueError(
        "an image must be a PIL image, a uint8 array or tensor, or a normalized float tensor (C, H, W), got a value of "
        f"type {type(image).__name__}{dtype}"
    )


def label_of(label: object) -> int:
    """The number of a class, from an int or an integer of NumPy or torch. Raises ``ValueError`` for anything else."""
    if isinstance(label, np.ndarray | np.generic):
        label = torch.from_numpy(np.asarray(label))
    if isinstance(label, Tensor) and label.numel() == 1 and _is_integer(label):
        label = int(label.item())
    if isinstance(label, int) and not isinstance(label, bool):
        return label
    raise ValueError(f"the label must be the number of a class, got {label!r} of type {type(label).__name__}")


def class_names(dataset: object) -> tuple[str, ...]:
    """The attribute ``classes`` of a dataset, as torchvision's have it; empty where there is none."""
    if isinstance(dataset, Subset):
        return class_names(dataset.dataset)
    names = getattr(dataset, "classes", None)
    return tuple(map(str, names)) if isinstance(names, list | tuple) else ()


def known_labels(dataset: object) -> Tensor | None:
    """All labels (D,) int64 without reading an item, where the dataset has them at hand: ``None`` if not.

    They are the attribute ``targets``, as torchvision's datasets have it, or the second tensor of a ``TensorDataset``.
    """
    if isinstance(dataset, Subset):
        inner = known_labels(dataset.dataset)
        return None if inner is None else inner[torch.as_tensor(list(dataset.indices), dtype=torch.int64)]
    if isinstance(dataset, TensorDataset):
        labels: object = dataset.tensors[1] if len(dataset.tensors) == 2 else None
    else:
        labels = None if getattr(dataset, "target_transform", None) else getattr(dataset, "targets", None)
    try:
        found = torch.as_tensor(labels) if isinstance(labels, Tensor | np.ndarray | list | tuple) else None
    except (TypeError, ValueError, RuntimeError):
        return None
    if found is None or found.dim() != 1 or not _is_integer(found) or not isinstance(dataset, Sized):
        return None
    return found.long().cpu() if len(found) == len(dataset) and len(found) else None


def is_indexed(dataset: object) -> TypeGuard[Indexed]:
    """Whether ``dataset`` has a length and items by number."""
    return isinstance(dataset, Indexed) and not isinstance(dataset, IterableDataset)


def _bytes(image: Tensor, *, first_channels: bool) -> Tensor:
    """(H, W, C), wherever the channels were; ``first_channels`` decides for 3x3x3 and its like."""
    if image.dim() == 2 and image.shape[0] == image.shape[1]:
        return image[..., None].contiguous()
    if image.dim() == 3:
        a, b, c = image.shape
        if b == c and (a != b or first_channels):
            return image.permute(1, 2, 0).contiguous()
        if a == b:
            return image.contiguous()
    raise ValueError(
        f"an image must be square, (H, W), (H, W, C) or (C, H, W), got {tuple(image.shape)}; pad or resize it"
    )


def _is_integer(values: Tensor) -> bool:
    return not (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool)
