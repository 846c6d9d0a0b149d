"""Which trials of a sweep are stopped early: the settings of each rule. Ray carries them out. Time is in epochs."""

from dataclasses import dataclass
from typing import final

from qtrain.utils.checks import check_range


@dataclass(frozen=True, kw_only=True)
class HalvingSettings:
    """Asynchronous successive halving: of each rung, one trial in ``reduction`` goes on.

    Rungs lie at ``grace``, ``grace * reduction``, ``grace * reduction**2``, ... epochs.
    """

    grace: int = 1
    reduction: float = 3.0

    def __post_init__(self) -> None:
        check_range(type(self).__name__, "[1, inf)", grace=self.grace, hint="in epochs")
        check_range(type(self).__name__, "(1, inf)", reduction=self.reduction)


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
        check_range("Median", "[1, inf)", grace=self.grace, least=self.least)


Scheduler = Asha | MoAsha | Median
"""The rules there are; ``None`` in a config runs every trial to its last epoch."""
