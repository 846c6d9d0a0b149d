"""A loader of image files without labels, of which some may be unreadable; worker processes decode them."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from qtrain.data.decode import read_image
from qtrain.data.image_set import REPAIR, UnreadableImageError
from qtrain.data.workers import outlive_sigterm
from qtrain.utils.errors import first_line


class FileBatch(NamedTuple):
    """``image`` (N, C, H, W) of the N files ``paths``, and what is wrong with the ``unreadable`` ones among them."""

    paths: list[str]
    image: Tensor
    unreadable: list[UnreadableImageError]


class _Files(Dataset[tuple[str, Tensor | UnreadableImageError]]):
    """What runs in a worker: the path of a file, and its pixels or what is wrong with it."""

    def __init__(self, paths: Sequence[str], transform: Callable[[Image.Image], Tensor]) -> None:
        self._paths = paths
        self._transform = transform

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, number: int) -> tuple[str, Tensor | UnreadableImageError]:
        path = self._paths[number]
        try:
            return path, self._transform(read_image(path, path))
        except UnreadableImageError as error:
            return path, error
        except (MemoryError, ValueError) as error:  # an image of 1 x 100,000 pixels cannot be resized to a square
            return path, UnreadableImageError(path, f"cannot be resized: {first_line(error)}", REPAIR)


def file_batches(
    paths: Sequence[str],
    transform: Callable[[Image.Image], Tensor],
    *,
    batch_size: int,
    workers: int,
    pin_memory: bool = False,
) -> DataLoader[FileBatch]:
    """The files ``paths`` in their order, ``batch_size`` a batch, decoded by ``qtrain.data.decode`` and transformed.

    ``workers`` processes decode; with 0 this one does.
    """
    files = _Files(paths, transform)
    return DataLoader(
        files,  # type: ignore[arg-type]  # what a loader yields is what its collate_fn makes of the items
        batch_size=batch_size,
        collate_fn=_batch,
        num_workers=min(workers, -(-len(paths) // batch_size)),
        pin_memory=pin_memory,
        generator=torch.Generator(),  # the global one is left alone
        worker_init_fn=outlive_sigterm,
    )


def _batch(items: Sequence[tuple[str, Tensor | UnreadableImageError]]) -> FileBatch:
    good = [(path, pixels) for path, pixels in items if isinstance(pixels, Tensor)]
    image = torch.stack([pixels for _, pixels in good]) if good else torch.empty(0)
    return FileBatch([path for path, _ in good], image, [own for _, own in items if not isinstance(own, Tensor)])
