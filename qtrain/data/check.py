"""Which images can be decoded: all are tried, by several processes, before anything is trained.

What an epoch holds must be known before the first one. Were an image replaced when it fails, the images of an epoch
would depend on the state of a disk at that moment, and ranks and resumed runs could differ. So the result is kept, for
as long as the files stay as they are: all processes of a machine, and later runs, take it from there.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch.utils.data import Dataset

from qtrain.data.cache import default_folder
from qtrain.data.image_set import ImageSet, SomeImages, UnreadableImageError
from qtrain.data.workers import each_item
from qtrain.functional.ranks import largest_of_ranks, world_size
from qtrain.utils.atomic_write import write_text

log = logging.getLogger(__name__)


def readable(sets: Sequence[ImageSet], name: str, *, workers: int, skip: bool) -> list[ImageSet]:
    """The ``sets`` of the data set ``name``, without the images that cannot be decoded where ``skip``.

    Raises ``ValueError`` with the list of these images where not ``skip``, and where a class would lose all of them.
    """
    found = [_find(images, name, workers) for images in sets]
    bad = [error for errors in found for error in errors.values()]
    total = sum(map(len, sets))
    if not bad:
        log.info("%s: all %d images can be decoded", name, total)
        return list(sets)
    if not skip:
        raise ValueError(
            f"{name}: {len(bad)} of {total} images cannot be decoded: {'; '.join(bad)}. Repair or remove them, or "
            "leave them out by data.on_error=skip"
        )
    for error in bad:
        log.warning("left out: %s", error)
    log.warning("%s: %d of %d images cannot be decoded and are left out", name, len(bad), total)
    return [_without(images, errors) for images, errors in zip(sets, found, strict=True)]


def require_same_images(images: ImageSet, name: str, device: torch.device) -> None:
    """Raise ``ValueError`` on all ranks where some of them left out other images; each node checks its own files."""
    if world_size() == 1:
        return
    names = "\0".join(f"{images.target(number)} {Path(images.where(number)).name}" for number in range(len(images)))
    digest = int.from_bytes(sha256(names.encode()).digest()[:7], "big")
    pair = torch.tensor([digest, -digest], device=device)
    if largest_of_ranks(pair).sum() != 0:
        raise ValueError(
            f"{name}: on_error=skip left out other images on some nodes than on others; make the files of all nodes "
            "equal, or remove those that cannot be decoded"
        )


def _find(images: ImageSet, name: str, workers: int) -> dict[int, str]:
    """Number -> place and reason of each image that cannot be decoded, from an earlier check of the same files or new.

    A failure of the operating system says nothing about the image, so a check with one is not kept.
    """
    path = default_folder() / f"{name}-{images.fingerprint()}-unreadable.json"
    with ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(path.with_name(f".{path.name}.lock")))
        except OSError as error:
            log.warning("cannot keep the check of %s in %s (%s); each process checks all images", name, path, error)
            return {number: f"{error.where} ({error.reason})" for number, error in _tried(images, name, workers)}
        if (stored := _stored(path)) is not None:
            return stored
        errors = dict(_tried(images, name, workers))
        found = {number: f"{error.where} ({error.reason})" for number, error in errors.items()}
        if all(error.errno is None for error in errors.values()):
            write_text(path, json.dumps({str(number): message for number, message in found.items()}))
        return found


def _stored(path: Path) -> dict[int, str] | None:
    try:
        return {int(number): str(message) for number, message in json.loads(path.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, AttributeError):  # absent, or damaged
        return None


class _Tried(Dataset[UnreadableImageError | None]):
    """Decodes an image, and gives what went wrong."""

    def __init__(self, images: ImageSet) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, number: int) -> UnreadableImageError | None:
        try:
            self._images.image(number)
        except UnreadableImageError as error:
            return error
        return None


def _tried(images: ImageSet, name: str, workers: int) -> Iterator[tuple[int, UnreadableImageError]]:
    errors = each_item(_Tried(images), total=len(images), workers=workers, title=f"checking {name}", unit="images")
    for number, error in enumerate(errors):
        if error is not None:
            yield number, error


def _without(images: ImageSet, errors: dict[int, str]) -> ImageSet:
    if not errors:
        return images
    targets = np.array([images.target(number) for number in range(len(images))])
    left = np.array([number for number in range(len(images)) if number not in errors], dtype=np.int64)
    lost = np.setdiff1d(targets, targets[left])
    if len(lost):
        example = next(message for number, message in errors.items() if targets[number] == lost[0])
        raise ValueError(f"no image of {len(lost)} class(es) can be decoded, for example {example}")
    return SomeImages(images, left.tolist())
