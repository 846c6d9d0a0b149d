"""The interface of callbacks whose results a later stage of a run uses."""

from typing import Protocol, runtime_checkable


@runtime_checkable
class FindsLayerMetrics(Protocol):
    """A callback that measures numbers of layers, which a later stage uses."""

    def metrics(self) -> dict[str, float]:
        """A number for each layer, by its qualified name in the student."""
