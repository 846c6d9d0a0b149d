"""Files that appear under their name when they are whole, and not before."""

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

ROOM = 1024**2
"""Bytes; a disk with less left is full."""


class NoFileError(ValueError):
    """``path`` is there and is no file, so that nothing can take its place."""

    def __init__(self, path: Path) -> None:
        kind = "a folder" if path.is_dir() else "a device or a pipe"
        super().__init__(f"{path} is {kind}, not a file; give another path")


class NoSpaceError(OSError):
    """The disk is full; ``path`` was not written, and still holds what it held before."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            f"no space left on the disk of {path.parent}: {path.name} was not written; make room, and the same command "
            "goes on from the last resume point"
        )
        self.errno = errno.ENOSPC


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write to, whose content takes the place of ``path`` when the block ends well.

    At every moment, also after a power cut, ``path`` holds what it held before or all that was written. Processes that
    write the same file at once do not disturb each other: the last one wins. The folder is made where it is absent. A
    link stays one, and the file that it leads to is written. Raises :class:`NoFileError` for a folder or a device.
    """
    path = target_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        _to_disk(temporary)
        os.replace(temporary, path)
    except Exception as error:  # torch and safetensors raise errors of their own
        if _is_full(error, path.parent):
            raise NoSpaceError(path) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)
    # The rename itself must reach the disk; some network file systems refuse to open folders, and lose nothing by it.
    with contextlib.suppress(OSError):
        _to_disk(path.parent)


@contextmanager
def growing_file(path: Path) -> Iterator[IO[str]]:
    """A text file, written line by line, that takes the name ``path`` when the block ends well.

    Until then it is called :func:`partial_of`, and what an earlier writer left there is gone. A line is with the
    operating system as soon as it is whole, so that a writer that is killed loses none, and its file is seen to be
    unfinished. Names of files that are no valid UTF-8 are written as the bytes that they are.
    """
    path = target_of(path)
    partial = partial_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("w", buffering=1, encoding="utf-8", errors="surrogateescape", newline="") as file:
        yield file
    _to_disk(partial)
    os.replace(partial, path)
    with contextlib.suppress(OSError):
        _to_disk(path.parent)


def target_of(path: Path) -> Path:
    """The file that is written for ``path``, behind links. Raises :class:`NoFileError` for what is there and none."""
    real = path.resolve() if path.is_symlink() else path
    if real.exists() and not real.is_file():
        raise NoFileError(path)
    return real


def partial_of(path: Path) -> Path:
    """Where a file that is not whole yet lies: ``predictions.csv.partial`` beside ``predictions.csv``."""
    return path.with_name(f"{path.name}.partial")


def write_text(path: Path, text: str) -> None:
    """``text`` as the whole of ``path``, in UTF-8."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _is_full(error: Exception, folder: Path) -> bool:
    """Whether ``error``, of writing in ``folder``, comes of a full disk or a used-up quota."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    with contextlib.suppress(OSError):
        return not isinstance(error, ValueError) and shutil.disk_usage(folder).free < ROOM
    return False


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
