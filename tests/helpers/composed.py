"""Settings that several tests look at, composed once."""

from __future__ import annotations

from functools import cache

from qtrain.config.compose import compose
from qtrain.settings.run_settings import RunSettings


@cache
def composed_experiment(name: str, budget: str = "cpu") -> RunSettings:
    """The settings of ``+experiment=<name>``. Each stage is composed too, so that some take seconds."""
    return compose([f"+experiment={name}", f"budget={budget}"])
