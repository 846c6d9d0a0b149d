"""What was asked of a search and what it was told, event by event, so that a later command can go on with it.

A search is a function of its seed and of what happened to it, in order. A driver that was killed is taken up by a fresh
search of the same seed that is asked and told the same things again; no library's own state has to be read back.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

log = logging.getLogger(__name__)

SEARCH = "search.jsonl"

Kind = Literal["begin", "asked", "reported", "told", "mark"]
"""``begin``: of a command. ``mark``: time has passed."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened at ``time`` (Unix seconds).

    ``asked``: the search proposed ``knobs`` for trial ``id``. ``reported``: the trial had ``metrics`` after an epoch.
    ``told``: it ended with these ``metrics``, or failed where they are ``None``.
    """

    kind: Kind
    id: str = ""
    knobs: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] | None = None
    time: float = field(default_factory=time.time)


class SearchLog:
    """The events in ``folder/search.jsonl``: those of earlier commands, and room for more."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / SEARCH
        self.events = list(_read(self.path))
        self._mend()
        self.write(Event(kind="begin"))

    def write(self, event: Event) -> None:
        """Add ``event``; it is with the operating system when this returns, so that only a power cut can take it."""
        self.events.append(event)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(event)) + "\n")

    @property
    def spent_s(self) -> float:
        """Seconds that earlier commands have spent, each up to its last event."""
        return spent_s(self.events)

    def _mend(self) -> None:
        """Drop half a line that a killed writer left, which would spoil the next one."""
        if self.path.is_file():
            content = self.path.read_bytes()
            if not content.endswith(b"\n"):
                os.truncate(self.path, content.rfind(b"\n") + 1)


def spent_s(events: list[Event]) -> float:
    """Seconds from each ``begin`` to the last event before the next one."""
    total, begun, last = 0.0, 0.0, 0.0
    for event in events:
        if event.kind == "begin":
            total, begun = total + last - begun, event.time
        last = event.time
    return total + last - begun


def _read(path: Path) -> Iterator[Event]:
    if not path.is_file():
        return
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            event = Event(**json.loads(line))
        except (ValueError, TypeError):
            log.warning("%s:%d is no event (an unfinished write) and is ignored", path, number)
            continue
        if event.kind in get_args(Kind):
            yield event
