"""``len(images)`` in a forward, for tracers of torch, which run the forward to see what it does.

Python's ``len`` gives a plain number. So an exported file would take just as many images as the example has, and
``torch.fx``, whose tensors have no number yet, gives up.
"""

import builtins
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.proxy import Attribute

LISTS = ("size", "split", "chunk", "tensor_split", "unbind", "getattr", "meshgrid", "nonzero", "where")
"""What gives several tensors, or a tensor's shape, so that its length is another one."""

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
                names = vars(sys.modules[name])
                if "len" not in names:  # one of the user's own is left alone
                    names["len"] = _length
                    patches.callback(names.pop, "len")
        yield


def _length(sized: Any) -> Any:
    if isinstance(sized, fx.Proxy):
        source = getattr(sized.node.target, "__name__", sized.node.target)
        is_tensor = not isinstance(sized, Attribute) and source not in LISTS
    else:
        is_tensor = isinstance(sized, Tensor) and sized.ndim > 0
    return sized.shape[0] if is_tensor else builtins.len(sized)
