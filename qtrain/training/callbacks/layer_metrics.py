"""What a callback may leave to the next stage of a run."""

from __future__ import annotations

from typing import Protocol, runtime_checkable


@runtime_checkable
class FindsLayerMetrics(Protocol):
    """A callback that finds numbers about layers which a later stage acts on."""

    def metrics(self) -> dict[str, float]:
        """A number for each layer, by its qualified name in the student."""
