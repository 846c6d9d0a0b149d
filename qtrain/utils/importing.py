"""Classes and functions by their dotted path, from admitted packages only: a file must not choose what code runs."""

import importlib
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from qtrain.utils.user_code import BuilderPath, import_builder


class NotAdmittedError(ValueError):
    """Code at ``path`` is named that nobody has admitted."""

    def __init__(self, path: str, remedy: str = "if you trust it, admit it by its name") -> None:
        super().__init__(f"{path} is code of your own, which is not run unasked; {remedy}")
        self.path = path


def path_of(target: Any, *, importable: bool = True) -> str:
    """The dotted path of a class or function, from which :func:`import_object` gets it again.

    Raises ``ValueError`` for what is defined inside a function or a class, or in the program that runs, unless it need
    not be ``importable``.
    """
    path = f"{target.__module__}.{target.__qualname__}"
    if importable and ("." in target.__qualname__ or "<" in path or target.__module__ == "__main__"):
        raise ValueError(f"{path} cannot be imported elsewhere; define it at the top of a module of its own")
    return path


def import_object(path: str, *, admitted: Iterable[str]) -> Any:
    """The class or function at ``path``, which must lie in one of the ``admitted`` packages, modules or be one itself.

    It must be defined in one of them too: what such a module merely imports is not admitted with it. Raises
    ``ValueError`` where it is not admitted, or where there is none.
    """
    places = tuple(admitted)
    if not _lies_in(path, places):
        raise NotAdmittedError(path)
    found = import_builder(BuilderPath(path))
    home = f"{getattr(found, '__module__', None)}.{getattr(found, '__qualname__', type(found).__qualname__)}"
    if path not in places and not _lies_in(home, places):
        raise ValueError(f"{path} is defined elsewhere, as {home}, and is not run unasked; if you trust it, admit that")
    return found


def import_without(module: str, *packages: str) -> None:
    """Import ``module`` as if ``packages`` were not installed; afterwards they can be imported as usual.

    For a library that imports a slow package only to offer more where it is installed. Nothing is hidden where the
    module or the package was imported before.
    """
    hidden = [name for name in packages if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        importlib.import_module(module)
    finally:
        for name in hidden:
            del sys.modules[name]


def _lies_in(path: str, places: Sequence[str]) -> bool:
    return any(path == place or path.startswith(f"{place}.") for place in places)
