"""What proposes the trials of a sweep, one after the other. It is a function of its seed and of what happened to it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from math import isfinite
from random import Random
from typing import Final, final

from qtrain.sweep.pareto import Objectives
from qtrain.sweep.space import Given, Point, Space

NO_MORE: Final = "FINISHED"
"""What a searcher says that will propose nothing more; Ray's searchers say the same."""

EPOCHS: Final = "epochs"
"""The metric of a trial that has not ended, or was stopped: how many it had done."""

LARGEST_GRID = 100_000


class SpaceSearcher(ABC):
    """Proposes points of a space and learns what became of them. Asked and told the same, it proposes the same.

    ``trials`` is how many it proposes at most; ``None``: as many as it is asked for.
    """

    trials: int | None = None

    @abstractmethod
    def suggest(self, trial_id: str) -> Point | str | None:
        """The point of a new trial; ``None`` while it has to wait for others; :data:`NO_MORE` after the last."""

    @abstractmethod
    def overrides(self, trial_id: str) -> list[str]:
        """What that trial changes in the sweep's config."""

    @abstractmethod
    def parent(self, trial_id: str) -> str | None:
        """The trial whose training that one goes on with; ``None`` where it starts by itself."""

    @abstractmethod
    def on_trial_result(self, trial_id: str, metrics: Mapping[str, float]) -> None:
        """The trial has done one more epoch."""

    @abstractmethod
    def on_trial_complete(self, trial_id: str, metrics: Mapping[str, float] | None = None, error: bool = False) -> None:
        """The trial has ended with ``metrics``, or without any where it failed; stopped early, with :data:`EPOCHS`."""


class PointSearcher(SpaceSearcher):
    """Base of those whose trials each stand for a point of ``space``, start by themselves, and count once ended.

    :meth:`suggest` of a subclass keeps what it proposes in ``_points``.
    """

    def __init__(self, space: Space) -> None:
        self._space = space
        self._points: dict[str, Point] = {}

    @final
    def overrides(self, trial_id: str) -> list[str]:
        return self._space.overrides(self._points[trial_id])

    @final
    def parent(self, trial_id: str) -> str | None:
        return None

    @final
    def on_trial_result(self, trial_id: str, metrics: Mapping[str, float]) -> None:
        """Nothing: what has not ended teaches nothing."""


@final
class GridSearcher(PointSearcher):
    """Every combination of ``space`` once, in random order, after one that agrees with each of ``start``.

    A range counts as ``points`` values. There are at most ``trials``.
    """

    def __init__(self, space: Space, *, points: int, trials: int, seed: int, start: Sequence[Given] = ()) -> None:
        super().__init__(space)
        count = space.count(points)
        if count > LARGEST_GRID:
            raise ValueError(
                f"GridSearch: the space has {count:,} combinations, of which nobody will see a part that counts; take "
                "fewer points, or search@sweep.search=nsga2"
            )
        self.trials = min(count, trials)
        found = list(space.combinations(points))
        Random(seed).shuffle(found)
        wanted = [space.completed(point) for point in start]
        first = [place for own in wanted if (place := _agreeing(found, own)) is not None]
        order = dict.fromkeys([*first, *range(count)])
        self._left = [found[place] for place in order][:trials]

    def suggest(self, trial_id: str) -> Point | str | None:
        if not self._left:
            return NO_MORE
        self._points[trial_id] = self._left.pop(0)
        return self._points[trial_id]

    def on_trial_complete(self, trial_id: str, metrics: Mapping[str, float] | None = None, error: bool = False) -> None:
        """Nothing: a grid learns nothing."""


def complete(metrics: Mapping[str, float] | None, objectives: Objectives) -> bool:
    """Whether a trial has a finite metric for each of ``objectives``."""
    return metrics is not None and all(name in metrics and isfinite(metrics[name]) for name in objectives)


def _agreeing(points: Sequence[Point], wanted: Point) -> int | None:
    """The place of the first of ``points`` that has the values ``wanted``, as far as they count in it."""
    return next((n for n, own in enumerate(points) if all(own.get(k, v) == v for k, v in wanted.items())), None)
