"""A function that is compiled in one graph, and may fall back to what it was."""

import logging
from collections.abc import Callable
from typing import Generic, ParamSpec, TypeVar, final

import torch

from qtrain.utils.errors import one_line

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

NOT_COMPILED = "the step is not compiled, since compiling it failed (%s: %s); training goes on without"


@final
class Compiled(Generic[P, R]):
    """``function`` by ``torch.compile`` in one graph; with ``or_eager`` it stays as it was where the first call fails.

    A compiler may be missing, or not know an operation. It fails before it has computed anything, so the same call is
    repeated without it, and the reason is logged in one line. ``gave_up`` says that this happened, and may be set.
    """

    def __init__(self, function: Callable[P, R], *, or_eager: bool = False) -> None:
        self._function = function
        self._compiled: Callable[P, R] = torch.compile(function, fullgraph=True, dynamic=False)
        self._tried = not or_eager
        self.gave_up = False

    def __call__(self, *arguments: P.args, **options: P.kwargs) -> R:
        if self.gave_up:
            return self._function(*arguments, **options)
        if self._tried:
            return self._compiled(*arguments, **options)
        try:
            result = self._compiled(*arguments, **options)
        except Exception as error:
            log.warning(NOT_COMPILED, type(error).__name__, one_line(error)[:200])
            self.gave_up = True
            return self._function(*arguments, **options)
        self._tried = True
        return result
