"""The task that measures how long each layer of a network takes on this machine, by its shape and bits."""

from qtrain.pipeline.profile import profile
from qtrain.settings.run_settings import RunSettings


def run(settings: RunSettings) -> dict[str, float]:
    """Write the table that ``cost=latency`` reads; returns, by bits, the predicted time of the network over its own."""
    return profile(settings)
