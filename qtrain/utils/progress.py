"""Progress of work that goes through many things: a bar on a terminal, or a line every ten seconds in a log file."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

log = logging.getLogger(__name__)

T = TypeVar("T")


def duration(seconds: float) -> str:
    """``59 s``, ``3:25`` or ``2:03:25``: seconds, minutes or hours."""
    whole = max(0, round(seconds))
    hours, minutes, rest = whole // 3600, whole % 3600 // 60, whole % 60
    if hours:
        return f"{hours}:{minutes:02}:{rest:02}"
    return f"{minutes}:{rest:02}" if minutes else f"{rest} s"


def tracked(
    things: Iterable[T], *, total: int, title: str, unit: str, bar: bool | None = None, every_s: float = 10.0
) -> Iterator[T]:
    """``things``, of which there are ``total``, one by one; shows how many are done, their rate and the time left.

    ``unit`` is their plural. ``bar=None`` shows a bar if stderr is a terminal; otherwise a line is logged each
    ``every_s`` seconds.
    """
    with ExitStack() as stack:
        shown_bar: Progress | None = None
        if sys.stderr.isatty() if bar is None else bar:
            columns = (TextColumn(title), BarColumn(), TextColumn("{task.description}"))
            shown_bar = Progress(*columns, console=Console(stderr=True), transient=True)
            stack.enter_context(shown_bar).add_task("", total=total)
            every_s = 0.5
        started = shown = time.perf_counter()
        for done, thing in enumerate(things, start=1):
            yield thing
            now = time.perf_counter()
            if now - shown < every_s:
                continue
            shown = now
            rate = done / (now - started)
            line = f"{done}/{total} {unit}  {rate:.{rate < 10:d}f} {unit}/s  {duration((total - done) / rate)} left"
            if shown_bar is None:
                log.info("%s: %s", title, line)
            else:
                shown_bar.update(shown_bar.task_ids[0], completed=done, description=line)
