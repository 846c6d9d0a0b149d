"""A function that is compiled in one graph, and may fall back to what it was."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Generic, ParamSpec, TypeVar, final

import torch
from torch._functorch import config as functorch

from qtrain.utils.errors import one_line

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

NOT_COMPILED = "the step is not compiled, since compiling it failed (%s: %s); training goes on without"

OPTIONS = {
    "ban_recompute_materialized_backward": False,
    "ban_recompute_used_far_apart": False,
    "autograd_cache_allow_custom_autograd_functions": True,
}
"""What the compiler may do, although by itself it does not.

It may compute cheap things twice. A convolution of the backward reads codes, and a gradient's mask comes from what was
rounded. Both follow from what is kept anyway, by cheap operations in the same pass over the memory. And it may find a
step with gradients written by hand on disk, whose key has their operations too.
"""

KERNELS = {"realize_reads_threshold": 8}
"""Values that an expression of two readers may read without being written to memory first.

By itself the compiler allows four. A quantizer's gradient reads five: step and both bounds beside input and gradient.
"""


def compiling() -> AbstractContextManager[Any]:
    """Inside, the compiler has :data:`OPTIONS`: it keeps less between forward and backward, and finds more on disk."""
    known = {name: value for name, value in OPTIONS.items() if hasattr(functorch, name)}
    patched: AbstractContextManager[Any] = functorch.patch(known)
    return patched


@final
class Compiled(Generic[P, R]):
    """``function`` by ``torch.compile`` in one graph; with ``or_eager`` it stays as it was where the first call fails.

    Its backward computes cheap operations again instead of keeping their results (:func:`compiling`). A compiler may
    be missing, or not know an operation. It fails before it has computed anything, so the same call is repeated without
    it, and the reason is logged in one line. ``gave_up`` says that this happened, and may be set.
    """

    def __init__(self, function: Callable[P, R], *, or_eager: bool = False) -> None:
        self._function = function
        self._compiled: Callable[P, R] = torch.compile(function, fullgraph=True, dynamic=False, options=dict(KERNELS))
        self._tried = not or_eager
        self.gave_up = False

    def __call__(self, *arguments: P.args, **options: P.kwargs) -> R:
        if self.gave_up:
            return self._function(*arguments, **options)
        if self._tried:
            return self._call(*arguments, **options)
        try:
            result = self._call(*arguments, **options)
        except Exception as error:
            log.warning(NOT_COMPILED, type(error).__name__, one_line(error)[:200])
            self.gave_up = True
            return self._function(*arguments, **options)
        self._tried = True
        return result

    def _call(self, *arguments: P.args, **options: P.kwargs) -> R:
        with compiling():  # at each call, since each may compile once more
            return self._compiled(*arguments, **options)
