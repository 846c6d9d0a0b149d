"""A model in eval mode for a while, and afterwards each of its modules in the mode that it had."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """``model`` is in eval mode inside; on leaving, by an error too, every module gets back its own mode.

    Modes are restored one by one, because a model in training may hold layers that are frozen in eval mode.
    """
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in before.items():
            module.training = mode
