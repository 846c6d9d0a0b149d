"""``len(images)`` in a forward, for torch's exporter, which runs the forward to see what it does.

Python's ``len`` gives a plain number, so that the file would take just as many images as the example has.
"""

import builtins
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from torch import Tensor, nn

LIBRARIES = ("torch", "builtins")
"""Packages whose code is left alone: they take a tensor's size from its shape."""


@contextmanager
def open_lengths(model: nn.Module) -> Iterator[None]:
    """Inside, ``len(tensor)`` is ``tensor.shape[0]``, a number that may stay open, to the code beside ``model``'s.

    That is the code of the Python modules in which the classes of ``model``'s modules are defined.
    """
    homes = {kind.__module__ for module in model.modules() for kind in type(module).__mro__}
    with ExitStack() as patches:
        for name in sorted(homes):
            if name.partition(".")[0] not in LIBRARIES and name in sys.modules:
                patches.enter_context(patch.object(sys.modules[name], "len", _length, create=True))
        yield


def _length(sized: Any) -> Any:
    return sized.shape[0] if isinstance(sized, Tensor) and sized.ndim else builtins.len(sized)
