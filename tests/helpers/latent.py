"""The state dict of a run's student in floating point, as training left it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from qtrain.settings.run_files import LATENT


def latent_state(run: Path) -> dict[str, Tensor]:
    """Weights, scales and statistics of the student that a run has left in its folder ``run``."""
    state: dict[str, Tensor] = torch.load(run / LATENT, weights_only=True)
    return state
