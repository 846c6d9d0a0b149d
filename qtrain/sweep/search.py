"""How a sweep chooses what to try next: the settings of each way, of which the task makes a searcher."""

from dataclasses import dataclass
from typing import final

from qtrain.utils.checks import check_range


@final
@dataclass(frozen=True, kw_only=True)
class RandomSearch:
    """Each trial drawn from the space anew, knobs independent of each other."""


@final
@dataclass(frozen=True, kw_only=True)
class GridSearch:
    """Every combination once, in random order. A range counts as ``points`` values, evenly spaced."""

    points: int = 4

    def __post_init__(self) -> None:
        check_range("GridSearch", "[2, inf)", points=self.points, hint="a range has two ends")


@final
@dataclass(frozen=True, kw_only=True)
class Tpe:
    """Tree-structured Parzen estimator: where good trials are dense, bad ones rare (Bergstra et al., NeurIPS 2011).

    The first ``startup`` trials are random. ``multivariate`` regards knobs together, ``group`` each set of knobs that
    conditions switch on together. With several objectives a good trial is one of the front, and its neighbors
    (Ozaki et al., GECCO 2020).
    """

    startup: int = 10
    candidates: int = 24
    multivariate: bool = True

    def __post_init__(self) -> None:
        check_range("Tpe", "[1, inf)", startup=self.startup, candidates=self.candidates)


@final
@dataclass(frozen=True, kw_only=True)
class Nsga2:
    """Evolution of a front: parents by rank and crowding, then crossover and mutation (Deb et al., 2002).

    ``mutation`` is the probability that a knob is drawn anew; ``None``: one over the number of knobs.
    """

    population: int = 16
    crossover: float = 0.9
    mutation: float | None = None

    def __post_init__(self) -> None:
        check_range("Nsga2", "[2, inf)", population=self.population)
        check_range("Nsga2", "[0, 1]", crossover=self.crossover, mutation=self.mutation)


@final
@dataclass(frozen=True, kw_only=True)
class LocalSearch:
    """Local search on the front (Paquete, Chiarandini, Stützle 2004): neighbors of what nobody beats so far.

    For good points to begin with, and few trials: each is one of the front of which each knob is changed with
    probability ``change``, one of them at least: drawn anew with probability ``resample``, otherwise moved to a
    neighboring value. The first ``startup`` trials, where no others are given, are random.
    """

    startup: int = 4
    change: float = 0.15
    resample: float = 0.1

    def __post_init__(self) -> None:
        check_range("LocalSearch", "[1, inf)", startup=self.startup)
        check_range("LocalSearch", "[0, 1]", change=self.change, resample=self.resample)


@final
@dataclass(frozen=True, kw_only=True)
class Population:
    """Students side by side that learn from each other while they train (Jaderberg et al., arXiv 1711.09846).

    Every ``interval`` epochs all ``size`` of them are ranked, by fronts where there are several objectives (Dushatskiy
    et al., ICML 2023, arXiv 2306.01436). The last ``quantile`` of them take over weights, scales and optimizer of one
    of the first, and knobs of which each is changed with probability ``change``: drawn anew with probability
    ``resample``, otherwise moved to a neighboring value. Bits may be among them.

    ``carry_optimizer``: the optimizer's moments go on as well; not where a knob changes which parameters there are.
    """

    size: int = 8
    interval: int = 1
    quantile: float = 0.25
    change: float = 0.2
    resample: float = 0.25
    carry_optimizer: bool = True

    def __post_init__(self) -> None:
        check_range("Population", "[2, inf)", size=self.size)
        check_range("Population", "[1, inf)", interval=self.interval)
        check_range("Population", "[0, 1]", change=self.change, resample=self.resample)
        check_range("Population", "(0, 0.5]", quantile=self.quantile)


Search = RandomSearch | GridSearch | Tpe | Nsga2 | LocalSearch | Population
"""The ways there are."""
