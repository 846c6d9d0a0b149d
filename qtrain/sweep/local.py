"""Local search on the front: each trial is the neighbor of one that nobody beats."""

from collections.abc import Mapping, Sequence
from random import Random
from typing import final

from qtrain.sweep.mutation import mutate
from qtrain.sweep.pareto import Objectives, dominates, losses_of
from qtrain.sweep.search import LocalSearch
from qtrain.sweep.searcher import EPOCHS, PointSearcher, complete
from qtrain.sweep.space import Given, Point, Space

PATIENCE = 100
"""How often a neighbor is drawn before one is taken that was tried already."""


@final
class LocalSearcher(PointSearcher):
    """Pareto local search; see :class:`qtrain.sweep.search.LocalSearch` for its ``settings``.

    After the points of ``start`` come draws from the whole space, until trials have ended; then neighbors of the front
    of these. Of the front, that one is next which has had the fewest neighbors. Trials that were stopped early are
    not on it.
    """

    def __init__(
        self, space: Space, settings: LocalSearch, *, objectives: Objectives, seed: int, start: Sequence[Given] = ()
    ) -> None:
        super().__init__(space)
        self._settings, self._objectives, self._seed = settings, objectives, seed
        self._start = [space.completed(point) for point in start]
        self._ended: dict[str, tuple[float, ...]] = {}
        self._neighbors: dict[str, int] = {}

    def suggest(self, trial_id: str) -> Point | str | None:
        number = len(self._points)
        source = Random(f"{self._seed}/{number}")
        front = self._front()
        if number < len(self._start):
            given = self._start[number]
            point = self._space.choose(lambda name, domain: given[name] if name in given else domain.draw(source))
        elif number < self._settings.startup or not front:
            point = self._space.choose(lambda name, domain: domain.draw(source))
        else:
            fewest = min(self._neighbors.get(id, 0) for id in front)
            parent = source.choice([id for id in front if self._neighbors.get(id, 0) == fewest])
            self._neighbors[parent] = fewest + 1
            point = self._neighbor(self._points[parent], source)
        self._points[trial_id] = point
        return point

    def on_trial_complete(self, trial_id: str, metrics: Mapping[str, float] | None = None, error: bool = False) -> None:
        if not error and metrics is not None and EPOCHS not in metrics and complete(metrics, self._objectives):
            self._ended[trial_id] = losses_of(metrics, self._objectives)

    def _front(self) -> list[str]:
        """Trials that nobody dominates, in the order in which they were proposed: in which they end is chance."""
        found = [(id, self._ended[id]) for id in self._points if id in self._ended]
        return [id for id, own in found if not any(dominates(other, own) for _, other in found)]

    def _neighbor(self, point: Point, source: Random) -> Point:
        settings = self._settings
        for _ in range(PATIENCE):
            new = mutate(self._space, point, source, change=settings.change, resample=settings.resample)
            if new not in self._points.values():
                break
        return new
