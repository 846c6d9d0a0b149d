"""Students that train side by side and learn from each other: bits and settings change while they train.

A generation is a stage of each of them, and each is a run of its own, whose config has the stages of its whole line: so
each point that the search reaches can be trained again by one command, and a run goes on from where its parent ended.
Generations wait for each other, so that the same seed and the same metrics make the same line.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import final

from qtrain.sweep.knobs import Spellable, spelled
from qtrain.sweep.mutation import mutate
from qtrain.sweep.pareto import Objectives, losses_of, ranked
from qtrain.sweep.search import Population
from qtrain.sweep.searcher import NO_MORE, SpaceSearcher, complete
from qtrain.sweep.space import Given, Point, Space

GENERATION = "generation"
"""Says in a trial's point how many intervals its student has trained."""


@dataclass(frozen=True)
class Member:
    """A student of one generation: the knobs of each of its stages so far, and the trial that had all but the last."""

    line: tuple[Point, ...]
    parent: str | None = None


@dataclass
class Generation:
    """Students that train side by side: those that still wait, and by trial those that were begun and that ended."""

    waiting: list[Member]
    begun: dict[str, Member] = field(default_factory=dict)
    ended: dict[str, tuple[float, ...] | None] = field(default_factory=dict)

    @property
    def over(self) -> bool:
        return not self.waiting and len(self.ended) == len(self.begun)


@final
class PopulationSearcher(SpaceSearcher):
    """Population-based training in generations; see :class:`qtrain.sweep.search.Population` for its ``settings``.

    ``epochs`` are those of a whole training, ``lr_schedule`` is the config of its learning rate, of which each stage
    gets its part. ``start`` gives values of knobs to the first students.
    """

    def __init__(
        self,
        space: Space,
        settings: Population,
        *,
        objectives: Objectives,
        seed: int,
        epochs: int,
        lr_schedule: Mapping[str, Spellable],
        start: Sequence[Given] = (),
    ) -> None:
        if epochs % settings.interval:
            raise ValueError(
                f"Population: fit.epochs must be a multiple of interval, got {epochs} and {settings.interval}"
            )
        for name in space.parameters:
            if name == GENERATION:
                raise ValueError(f"Population: a knob must not be called {GENERATION!r}; call it otherwise, with a key")
        self._space, self._settings, self._objectives, self._seed = space, settings, objectives, seed
        self._generations = epochs // settings.interval
        self.trials = settings.size * self._generations
        self._lr_schedule = lr_schedule
        given = [space.completed(point) for point in start[: settings.size]]
        given += [{}] * (settings.size - len(given))
        self._all = [Generation([Member((self._drawn(number, own),)) for number, own in enumerate(given)])]
        self._members: dict[str, Member] = {}

    def suggest(self, trial_id: str) -> Point | str | None:
        if self._all[-1].over and not self._next():
            return NO_MORE
        now = self._all[-1]
        if not now.waiting:
            return None
        member = now.waiting.pop(0)
        now.begun[trial_id] = self._members[trial_id] = member
        return {**member.line[-1], GENERATION: len(member.line)}

    def overrides(self, trial_id: str) -> list[str]:
        line = self._members[trial_id].line
        return [f"+stages.g{n}={spelled(self._stage(n, point))}" for n, point in enumerate(line, start=1)]

    def parent(self, trial_id: str) -> str | None:
        return self._members[trial_id].parent

    def on_trial_result(self, trial_id: str, metrics: Mapping[str, float]) -> None:
        """Nothing: students are compared when all have come as far."""

    def on_trial_complete(self, trial_id: str, metrics: Mapping[str, float] | None = None, error: bool = False) -> None:
        whole = not error and metrics is not None and complete(metrics, self._objectives)
        self._all[-1].ended[trial_id] = losses_of(metrics or {}, self._objectives) if whole else None

    def _next(self) -> bool:
        """Begin the next generation, unless the last one has trained to its end or nobody is left."""
        past = self._all[-1]
        # In the order in which they were begun: in which they end is chance.
        found = [(id, losses) for id in past.begun if (losses := past.ended[id]) is not None]
        if len(self._all) == self._generations or not found:
            return False
        order = [found[place][0] for place in ranked([losses for _, losses in found])]
        failed = [id for id in past.begun if past.ended[id] is None]
        # Those that failed left nothing to go on from and give way in any case.
        share = max(1, round(self._settings.quantile * len(past.begun)))
        giving_way = max(share - len(failed), 0)
        stay = order[: max(len(order) - giving_way, 1)]
        best = order[:share]
        members = []
        for number, id in enumerate(past.begun):
            source = Random(f"{self._seed}/{len(self._all)}/{number}")
            origin = id if id in stay else source.choice(best)
            line = past.begun[origin].line
            members.append(Member((*line, line[-1] if id in stay else self._changed(line[-1], source)), origin))
        self._all.append(Generation(members))
        return True

    def _drawn(self, number: int, given: Point) -> Point:
        source = Random(f"{self._seed}/0/{number}")
        return self._space.choose(lambda name, domain: given[name] if name in given else domain.draw(source))

    def _changed(self, point: Point, source: Random) -> Point:
        return mutate(self._space, point, source, change=self._settings.change, resample=self._settings.resample)

    def _stage(self, number: int, point: Point) -> list[str]:
        """The overrides of stage ``number``: its knobs, its length, and its part of the learning rate's course."""
        window: dict[str, Spellable] = {
            "_target_": "qtrain.schedules.window.Window",
            "schedule": self._lr_schedule,
            "begin": (number - 1) / self._generations,
            "finish": number / self._generations,
        }
        carried = [f"fit.carry_optimizer={spelled(self._settings.carry_optimizer)}"] if number > 1 else []
        length = [f"fit.epochs={self._settings.interval}", *carried]
        return [*self._space.overrides(point), *length, "~lr_schedule", f"+lr_schedule={spelled(window)}"]
