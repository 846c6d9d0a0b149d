"""What a process that makes many runs keeps between them: data, full-precision models, observed inputs.

A run alone keeps nothing. Within :func:`run_cache_in` a run takes from the store what an earlier one has made, and is
the same run bit for bit: a key holds all that the value depends on, the state of torch's random numbers included, and
whoever takes a value gets a copy and the random numbers as they stood after it was made.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from hashlib import sha256
from typing import Any, NamedTuple, TypeVar, final

import torch

from qtrain.settings.run_identity import hash_of

T = TypeVar("T")


class _Kept(NamedTuple):
    value: Any
    random_state: torch.Tensor


@final
class RunCache:
    """A store of the ``most`` values of each kind that were asked for last."""

    def __init__(self, *, most: int = 4) -> None:
        if most < 1:
            raise ValueError(f"RunCache: most must be at least 1, got {most}")
        self.most = most
        self.hits = 0
        self._kinds: dict[str, OrderedDict[str, _Kept]] = {}

    def get(self, kind: str, key: str, make: Callable[[], T], copied: Callable[[T], T]) -> T:
        """The value of ``kind`` under ``key``, made where it is not here; in any case ``copied`` for the caller."""
        values = self._kinds.setdefault(kind, OrderedDict())
        key += sha256(torch.get_rng_state().numpy().tobytes()).hexdigest()
        if key in values:
            self.hits += 1
            values.move_to_end(key)
            torch.set_rng_state(values[key].random_state)
        else:
            values[key] = _Kept(make(), torch.get_rng_state())
            if len(values) > self.most:
                values.popitem(last=False)
        return copied(values[key].value)


_STORE: ContextVar[RunCache | None] = ContextVar("run_cache", default=None)


@contextmanager
def run_cache_in(store: RunCache) -> Iterator[None]:
    """Let runs in this block, and in this thread, share what is in ``store``."""
    token = _STORE.set(store)
    try:
        yield
    finally:
        _STORE.reset(token)


def cached(
    kind: str, depends_on: Mapping[str, object], make: Callable[[], T], copied: Callable[[T], T] = copy.deepcopy
) -> T:
    """What ``make`` gives, from the store where a run before has made it.

    ``depends_on`` is plain data that names all that ``make`` looks at. Without a store ``make`` is called and its value
    is the caller's own.
    """
    store = _STORE.get()
    return make() if store is None else store.get(kind, hash_of(depends_on, ignore=()), make, copied)
