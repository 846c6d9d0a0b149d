"""A function that is compiled in one graph, and may fall back to what it was."""

import logging
from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar, final

import torch

from qtrain.utils.compat import compiling, partitioner
from qtrain.utils.errors import one_line
from qtrain.utils.saved_masks import keep_booleans_as_bytes_

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

NOT_COMPILED = "%s is not compiled, since compiling it failed (%s: %s); training goes on without"

READS = 8
"""Values that an expression of two readers may read without being written to memory first.

By itself the compiler allows four. A quantizer's gradient reads five: step and both bounds beside input and gradient.
"""


def compiler_options() -> dict[str, Any]:
    """What torch's compiler is told beside what :func:`qtrain.utils.compat.compiling` says."""
    return {"realize_reads_threshold": READS, "custom_partitioner_fn": partitioner(keep_booleans_as_bytes_)}


@final
class Compiled(Generic[P, R]):
    """``function`` by ``torch.compile`` in one graph; with ``or_eager`` it stays as it was where the first call fails.

    Its backward computes cheap operations again instead of keeping their results, by
    :func:`qtrain.utils.compat.compiling`. A compiler may be missing, or not know an operation. It fails before it has
    computed anything, so the same call is repeated without it, and the reason is logged in one line, in which ``what``
    is the function's name. ``gave_up`` says that this happened, and may be set.
    """

    def __init__(self, function: Callable[P, R], *, or_eager: bool = False, what: str = "the step") -> None:
        self._function, self._what = function, what
        self._compiled: Callable[P, R] = torch.compile(
            function, fullgraph=True, dynamic=False, options=compiler_options()
        )
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
            log.warning(NOT_COMPILED, self._what, type(error).__name__, one_line(error)[:200])
            self.gave_up = True
            return self._function(*arguments, **options)
        self._tried = True
        return result

    def _call(self, *arguments: P.args, **options: P.kwargs) -> R:
        with compiling():  # at each call, since each may compile once more
            return self._compiled(*arguments, **options)
