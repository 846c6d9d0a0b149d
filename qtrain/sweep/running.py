"""What a sweep tells of itself while it goes on, and to whom."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from qtrain.sweep.domains import KnobValues
from qtrain.sweep.trial import Trial


@dataclass(frozen=True, kw_only=True)
class Running:
    """A trial that has not ended: its epoch out of ``epochs``, and its metrics so far.

    ``started`` is in Unix seconds; 0 while the trial waits for its worker.
    """

    id: str
    knobs: KnobValues = field(default_factory=dict)
    epoch: float = 0.0
    epochs: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    started: float = 0.0


class Display(Protocol):
    """Shows a sweep while it goes on."""

    def update(self, trials: Sequence[Trial], running: Iterable[Running] = ()) -> None:
        """Show all ``trials`` that have ended and all that are ``running``."""
