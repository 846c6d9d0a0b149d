"""How a sweep chooses what to try next: the settings of each way, of which the task makes a searcher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final


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
        if self.points < 2:
            raise ValueError(f"GridSearch: points of a range must be at least 2, its two ends, got {self.points}")


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
        _at_least("Tpe", startup=(self.startup, 1), candidates=(self.candidates, 1))


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
        _at_least("Nsga2", population=(self.population, 2))
        _share("Nsga2", crossover=self.crossover, mutation=self.mutation)


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
        _at_least("LocalSearch", startup=(self.startup, 1))
        _share("LocalSearch", change=self.change, resample=self.resample)


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
        _at_least("Population", size=(self.size, 2), interval=(self.interval, 1))
        _share("Population", change=self.change, resample=self.resample)
        if not 0 < self.quantile <= 0.5:
            raise ValueError(f"Population: quantile must be above 0 and at most 0.5, got {self.quantile}")


Search = RandomSearch | GridSearch | Tpe | Nsga2 | LocalSearch | Population
"""The ways there are."""


def _at_least(owner: str, **given: tuple[int, int]) -> None:
    for name, (value, least) in given.items():
        if value < least:
            raise ValueError(f"{owner}: {name} must be at least {least}, got {value}")


def _share(owner: str, **given: float | None) -> None:
    for name, value in given.items():
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"{owner}: {name} must be in [0, 1], got {value}")
