"""Who looks on while a run trains, without being part of its config and so of its identity: a sweep."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import pytorch_lightning as pl

from qtrain.spec import Position

MakeTrialCallback = Callable[[Position], pl.Callback]
"""A callback for a fit that begins at a position of the run: one for each stage."""

_MAKERS: ContextVar[tuple[MakeTrialCallback, ...]] = ContextVar("trial_callbacks", default=())


@contextmanager
def with_trial_callbacks(*makers: MakeTrialCallback) -> Iterator[None]:
    """Let ``makers`` add callbacks that look on at the stages of runs in this block, and in this thread."""
    token = _MAKERS.set(makers)
    try:
        yield
    finally:
        _MAKERS.reset(token)


def trial_callbacks(start: Position) -> tuple[pl.Callback, ...]:
    """Those that look on at a stage which begins at ``start``; not at the training of a teacher before it."""
    return tuple(make(start) for make in _MAKERS.get())
