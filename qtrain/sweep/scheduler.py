"""Which trials of a sweep are stopped early: the settings of each rule. Ray carries them out. Time is in epochs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final


@dataclass(frozen=True, kw_only=True)
class HalvingSettings:
    """Asynchronous successive halving: of each rung, one trial in ``reduction`` goes on.

    Rungs lie at ``grace``, ``grace * reduction``, ``grace * reduction**2``, ... epochs.
    """

    grace: int = 1
    reduction: float = 3.0

    def __post_init__(self) -> None:
        if self.grace < 1:
            raise ValueError(f"{type(self).__name__}: grace must be at least 1 epoch, got {self.grace}")
        if self.reduction <= 1:
            raise ValueError(f"{type(self).__name__}: reduction must be above 1, got {self.reduction}")


@final
class Asha(HalvingSettings):
    """The best by the first objective go on (Li et al., arXiv 1810.05934)."""


@final
class MoAsha(HalvingSettings):
    """The best by all objectives go on, front by front, so that the cheap are not stopped for being less accurate.

    Schmucker et al., arXiv 2106.12639, with the ranking of :func:`qtrain.sweep.pareto.ranked` in each rung.
    """


@final
@dataclass(frozen=True, kw_only=True)
class Median:
    """A trial stops whose best so far lies below the median of the others' means up to the same epoch.

    Not before ``grace`` epochs, nor before ``least`` other trials have come as far (Golovin et al., KDD 2017, §3.2.2).
    """

    grace: int = 1
    least: int = 3

    def __post_init__(self) -> None:
        for name, value in (("grace", self.grace), ("least", self.least)):
            if value < 1:
                raise ValueError(f"Median: {name} must be at least 1, got {value}")


Scheduler = Asha | MoAsha | Median
"""The rules there are; ``None`` in a config runs every trial to its last epoch."""
