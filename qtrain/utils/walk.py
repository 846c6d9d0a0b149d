"""Folders below a folder, behind links too."""

import os
from collections.abc import Iterator


def walk(folder: str | os.PathLike[str]) -> Iterator[tuple[str, list[str], list[str]]]:
    """As ``os.walk(folder, followlinks=True)``, without folders that a link leads to once more, or around in a circle.

    Of several ways to one folder, the first in the order of names counts, and one without links before others below it.
    """
    been: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in been:
            folders.clear()
            continue
        been.add(real)
        folders.sort()
        yield place, folders, names
