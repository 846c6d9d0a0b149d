"""Classes and functions by their dotted path, from admitted packages only: a file must not choose what code runs."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any


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
        raise ValueError(f"{path} is code of your own, which is not run unasked; admit it by its name")
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} cannot be imported ({error}); put its package on the Python path") from error
    if not callable(found):
        raise ValueError(f"{path} is a {type(found).__name__}, not a class or function")
    return found
