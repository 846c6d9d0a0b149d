"""What was asked of a search and what it was told, event by event, so that a later command can go on with it.

A search is a function of its seed and of what happened to it, in order. A driver that was killed is taken up by a fresh
search of the same seed that is asked and told the same things again; no library's own state has to be read back.
"""

import logging
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from qtrain.sweep.domains import KnobValue
from qtrain.utils.json_lines import append_line, read_lines

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
    knobs: dict[str, KnobValue] = field(default_factory=dict)
    metrics: dict[str, float] | None = None
    time: float = field(default_factory=time.time)


class SearchLog:
    """The events in ``folder/search.jsonl``: those of earlier commands, and room for more."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / SEARCH
        self.events, damaged = read_lines(self.path, lambda row: Event(**row))
        for number in damaged:
            log.warning("%s:%d is no event (an unfinished write) and is ignored", self.path, number)
        self.write(Event(kind="begin"))

    def write(self, event: Event) -> None:
        """Add ``event``; it is with the operating system when this returns, so that only a power cut can take it."""
        self.events.append(event)
        append_line(self.path, asdict(event))

    @property
    def spent_s(self) -> float:
        """Seconds that earlier commands have spent, each up to its last event."""
        return spent_s(self.events)


def spent_s(events: list[Event]) -> float:
    """Seconds from each ``begin`` to the last event before the next one."""
    total, begun, last = 0.0, 0.0, 0.0
    for event in events:
        if event.kind == "begin":
            total, begun = total + last - begun, event.time
        last = event.time
    return total + last - begun
