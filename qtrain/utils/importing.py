"""Classes and functions by their dotted path, from admitted packages only: a file must not choose what code runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qtrain.utils.user_code import BuilderPath, import_builder


class NotAdmittedError(ValueError):
    """Code at ``path`` is named that nobody has admitted."""

    def __init__(self, path: str, remedy: str = "admit it by its name") -> None:
        super().__init__(f"{path} is code of your own, which is not run unasked; {remedy}")
        self.path = path


def path_of(target: Any, *, importable: bool = True) -> str:
    """The dotted path of a class or function, from which :func:`import_object` gets it again.

    Raises ``ValueError`` for what is defined inside a function, or in the program that runs, unless it need not be
    ``importable``.
    """
    path = f"{target.__module__}.{target.__qualname__}"
    if importable and ("<" in path or target.__module__ == "__main__"):
        raise ValueError(f"{path} cannot be imported elsewhere; define it at the top of a module of its own")
    return path


def import_object(path: str, *, admitted: Iterable[str]) -> Any:
    """The class or function at ``path``, which must lie in one of the ``admitted`` packages, modules or be one itself.

    Raises ``ValueError`` where it does not, or where there is none.
    """
    if not any(path == place or path.startswith(f"{place}.") for place in admitted):
        raise NotAdmittedError(path)
    return import_builder(BuilderPath(path))
