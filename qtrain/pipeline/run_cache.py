"""What a process that makes many runs keeps between them: data, full-precision models, observed inputs.

A run alone keeps nothing. Within :func:`run_cache_in` a run takes from the store what an earlier one has made, and is
the same run bit for bit: a key holds all that the value depends on, the state of torch's random numbers included, and
whoever takes a value gets a copy and the random numbers as they stood after it was made.
"""

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from hashlib import sha256
from typing import Any, NamedTuple, TypeVar, final

import torch

from qtrain.settings.run_identity import hash_of
from qtrain.utils.memory import held_bytes

T = TypeVar("T")


class _Key(NamedTuple):
    kind: str
    of: str
    random_state: str


class _Kept(NamedTuple):
    value: Any
    random_state: torch.Tensor
    bytes: int


@final
class RunCache:
    """A store of the ``most`` values of each kind that were asked for last, of ``most_bytes`` together."""

    def __init__(self, *, most: int = 4, most_bytes: float = math.inf) -> None:
        if most < 1:
            raise ValueError(f"RunCache: most must be at least 1, got {most}")
        self.most, self.most_bytes = most, most_bytes
        self.hits = 0
        self._values: OrderedDict[_Key, _Kept] = OrderedDict()

    @property
    def bytes(self) -> int:
        """What the tensors and arrays of all values take."""
        return sum(kept.bytes for kept in self._values.values())

    def get(self, kind: str, key: str, make: Callable[[], T], copied: Callable[[T], T]) -> T:
        """The value of ``kind`` under ``key``, made where it is not here; in any case ``copied`` for the caller."""
        whole = _Key(kind, key, sha256(torch.get_rng_state().numpy().tobytes()).hexdigest())
        if whole in self._values:
            self.hits += 1
            self._values.move_to_end(whole)
            torch.set_rng_state(self._values[whole].random_state)
            return copied(self._values[whole].value)
        value = make()
        kept = _Kept(value, torch.get_rng_state(), held_bytes(value))
        if kept.bytes > self.most_bytes:
            return value  # for this caller alone
        self._values[whole] = kept
        alike = [other for other in self._values if other.kind == kind]
        for other in alike[: -self.most]:
            del self._values[other]
        while self.bytes > self.most_bytes:
            self._values.popitem(last=False)
        return copied(value)


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
