"""Image files below a folder, and those that a user names."""

import glob
import os
from collections.abc import Sequence

from torchvision.datasets.folder import IMG_EXTENSIONS

from qtrain.utils.walk import walk


def images_below(folder: str | os.PathLike[str]) -> list[str]:
    """Paths of the images in ``folder`` and below, folder by folder, in the order of their names.

    Images are told by their suffix. Files and folders whose names begin with a dot are left out: file managers and
    notebooks leave such.
    """
    files = []
    for place, folders, names in walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        images = (name for name in names if name.lower().endswith(IMG_EXTENSIONS) and not name.startswith("."))
        files.append((place, [os.path.join(place, name) for name in sorted(images)]))
    return [file for _, images in sorted(files) for file in images]


def find_images(places: Sequence[str]) -> list[str]:
    """The files that ``places`` name, in their order, each once.

    A place is a file, whatever its suffix; a folder, of which all images are taken as by :func:`images_below`; or a
    pattern such as ``photos/*.png`` or ``photos/**/*.jpg``, of files and folders. ``~`` is the home folder. Raises
    ``FileNotFoundError`` where a place has no image.
    """
    found: dict[str, None] = {}
    for place in places:
        files = _found(os.path.expanduser(place))
        if not files:
            raise FileNotFoundError(_nothing_at(place))
        found |= dict.fromkeys(files)
    return list(found)


def _found(place: str) -> list[str]:
    matching = [place] if os.path.exists(place) else sorted(glob.glob(place, recursive=True))
    return [file for path in matching for file in (images_below(path) if os.path.isdir(path) else [path])]


def _nothing_at(place: str) -> str:
    if os.path.isdir(os.path.expanduser(place)):
        return f"the folder {place} has no image, also not in its subfolders ({', '.join(IMG_EXTENSIONS)})"
    if glob.has_magic(place):
        return f"no image matches {place}"
    return f"there is no file or folder {place}"
