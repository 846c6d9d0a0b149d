"""Decoded datasets on disk, so that 60,000 images are not decompressed on every run.

A cache that is missing, outdated, half written or damaged is made anew, and the user need not care. The zip container's
CRC-32 of each array finds damage. The key in the file's name, made from the source files' names, sizes and times, finds
outdated caches.
"""

import hashlib
import logging
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from qtrain.utils.atomic_write import atomic_write

log = logging.getLogger(__name__)

LAYOUT = 3
"""Part of every key; raised when the meaning of the arrays changes."""


def default_folder() -> Path:
    """``$XDG_CACHE_HOME/qtrain/data``, by default below ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qtrain" / "data"


def fingerprint(files: list[Path], *more: str) -> str:
    """A key that changes with any file's name, size or time of change, and with any of ``more``."""
    parts = [str(LAYOUT), *more]
    for file in files:
        status = file.stat()
        parts += [file.name, str(status.st_size), str(status.st_mtime_ns)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def load_or_make(
    name: str, key: str, make: Callable[[], Mapping[str, np.ndarray]], *, folder: str | None = None
) -> dict[str, np.ndarray]:
    """The arrays of ``make()``, from ``folder``/``name``-``key``.npz if that is whole.

    Concurrent processes may both make them; each writes a file of its own and renames it, so that nobody ever sees
    half a cache. A folder that cannot be written to costs a warning and the decoding of every run.
    """
    path = (Path(folder).expanduser() if folder else default_folder()) / f"{name}-{key}.npz"
    arrays = _read(path)
    if arrays is None:
        log.info("decoding %s, once; kept in %s", name, path)
        arrays = dict(make())
        try:
            _write(path, arrays)
        except OSError as error:
            log.warning("cannot keep the decoded images in %s (%s); they are decoded again on every run", path, error)
    return arrays


def _read(path: Path) -> dict[str, np.ndarray] | None:
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {key: stored[key] for key in stored.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        log.warning("the cache %s is damaged (%s); it is made anew", path, error)
        return None


def _write(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    with atomic_write(path) as temporary, open(temporary, "xb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
