"""Between Ray and a search: which trial is next, and what the search is told of it.

Ray asks for a trial when it has room. What the search proposes becomes a config here, on the driver and ahead of time,
so that no worker waits for it; a config that has been run is recognized by its identity, told to the search, not run.
"""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, final

from ray.tune.search import Searcher

from qtrain.sweep.domains import KnobValue
from qtrain.sweep.run_trial import Proposal, described
from qtrain.sweep.search_log import Event, SearchLog
from qtrain.sweep.searcher import NO_MORE, SpaceSearcher
from qtrain.sweep.trial import Trial
from qtrain.utils.errors import ConfigError

log = logging.getLogger(__name__)

ComposeTrial = Callable[[list[str]], tuple[str, list[str]]]
"""From what the knobs change, as overrides, to the identity of the trial's config and all of its overrides.

Raises ``ConfigError`` where they make no config.
"""


@final
class Proposals(Searcher):
    """Up to ``trials`` trials of ``search``, at most ``parallel`` of them at once.

    ``ended`` are trials of earlier commands; those that were asked for and have not ended are proposed again, under
    their own ids. ``record`` is told of each trial that ends without being run: a duplicate, or one whose config is
    refused. ``again`` is told of each event of earlier commands that the search is told, in order.
    """

    def __init__(
        self,
        search: SpaceSearcher,
        *,
        compose: ComposeTrial,
        search_log: SearchLog,
        ended: Mapping[str, Trial],
        record: Callable[[Trial], None],
        trials: int,
        parallel: int | None = None,
        again: Callable[[Event], None] = lambda event: None,
    ) -> None:
        super().__init__()
        self._search, self._compose, self._search_log, self._record = search, compose, search_log, record
        self._trials, self._parallel = trials, parallel
        self._by_key = {trial.key: trial.id for trial in ended.values() if trial.status != "duplicate" and trial.key}
        self._ended = dict(ended)
        self._finished = False
        self._ids: dict[str, str] = {}
        self._twins: dict[str, list[Proposal]] = {}
        self._next: Proposal | None = None
        self._knobs: dict[str, dict[str, KnobValue]] = {}
        self.proposals: dict[str, Proposal] = {}
        self.ended_before: dict[str, dict[str, float] | None] = {}
        self._count, self._waiting = self._replay(again)
        for id, _ in self._waiting:
            self._ended.pop(id, None)  # stopped together with an earlier command

    def __getstate__(self) -> dict[str, object]:
        """Nothing: the search log is what a later command goes on from, not what Ray writes down."""
        return {}

    def set_search_properties(
        self, metric: str | None, mode: str | None, config: Mapping[str, object], **spec: object
    ) -> bool:
        return True  # the search knows its objectives by itself

    @property
    def ids(self) -> Mapping[str, str]:
        """The id in the sweep of each trial that Ray has, by Ray's id."""
        return self._ids

    def suggest(self, trial_id: str) -> Any:
        """A proposal's plain fields; ``None`` while there is no room; ``NO_MORE`` when there will be no more."""
        live = sum(id not in self._ended for id in self._ids.values())
        if self._parallel is not None and live >= self._parallel:
            self._prepare()  # while the others run
            return None
        proposal, self._next = self._next or self._propose(), None
        if proposal is None:
            return NO_MORE if self._finished else None
        self._ids[trial_id] = proposal.id
        return {"proposal": vars(proposal)}  # plain values: Ray writes them down

    def on_trial_result(self, trial_id: str, result: Mapping[str, str | float]) -> None:
        """An epoch of a trial has ended. Its worker goes on, so there is time to make the next proposal."""
        metrics = metrics_in(result)
        if "status" not in result and metrics:
            self._search_log.write(Event(kind="reported", id=self._ids[trial_id], metrics=metrics))
            self._search.on_trial_result(self._ids[trial_id], metrics)
        self._prepare()

    def on_trial_complete(
        self, trial_id: str, result: Mapping[str, str | float] | None = None, error: bool = False
    ) -> None:
        """The trial has ended, by itself or because it was stopped."""
        failed = error or not result or result.get("status") == "failed"
        self.tell(self._ids[trial_id], None if failed else metrics_in(result or {}))

    def tell(self, id: str, metrics: dict[str, float] | None) -> None:
        """Trial ``id`` has ended with ``metrics``, or failed; whoever repeats it has ended as well."""
        if id in self._ended:
            return
        self._tell(id, metrics)
        self._ended[id] = Trial(id=id, key=self.proposals[id].key, status="finished", metrics=metrics or {})
        for twin in self._twins.pop(id, ()):
            self._ended[twin.id] = _duplicate(twin, id, self._ended[id])
            self._record(self._ended[twin.id])
            self._tell(twin.id, metrics)

    def proposal_of(self, id: str) -> Proposal:
        """The proposal of a trial that has been asked for. Raises ``ConfigError`` where its knobs make no config."""
        if id not in self.proposals:
            key, overrides = self._compose(self._search.overrides(id))
            parent = self._search.parent(id)
            self.proposals[id] = Proposal(
                id=id,
                key=key,
                overrides=overrides,
                knobs=self._knobs[id],
                parent=None if parent is None else self._ended[parent].key,
            )
        return self.proposals[id]

    def save(self, checkpoint_path: str) -> None:
        """Nothing, for the same reason."""

    def restore(self, checkpoint_path: str) -> None:
        """Likewise."""

    def _tell(self, id: str, metrics: dict[str, float] | None) -> None:
        self._search_log.write(Event(kind="told", id=id, metrics=metrics))
        self._search.on_trial_complete(id, metrics, error=metrics is None)

    def _prepare(self) -> None:
        """Make the next proposal ahead of time."""
        if self._next is None and not self._finished:
            self._next = self._propose()

    def _propose(self) -> Proposal | None:
        """The next trial that has to be run, those of earlier commands first."""
        while self._waiting:
            id, knobs = self._waiting.pop(0)
            if (proposal := self._admitted(id, knobs)) is not None:
                return proposal
        while self._count < self._trials and not self._finished:
            id = trial_id(self._count + 1)
            point = self._search.suggest(id)
            if point is None:
                return None
            if isinstance(point, str):
                break
            knobs = dict(point)
            self._count += 1
            self._knobs[id] = knobs
            self._search_log.write(Event(kind="asked", id=id, knobs=knobs))
            if (proposal := self._admitted(id, knobs)) is not None:
                return proposal
        self._finished = True
        return None

    def _admitted(self, id: str, knobs: dict[str, KnobValue]) -> Proposal | None:
        """The proposal, or ``None`` where it needs no run and what became of it is recorded."""
        now = time.time()
        try:
            proposal = self.proposal_of(id)
        except ConfigError as error:
            self._record(Trial(id=id, key="", status="failed", knobs=knobs, reason=str(error), started=now, ended=now))
            self._tell(id, None)
            return None
        first = self._by_key.setdefault(proposal.key, id)
        if first == id:
            return proposal
        ended = self._ended.get(first)
        duplicate = _duplicate(proposal, first, ended)
        self._record(duplicate)
        if ended is None:
            self._twins.setdefault(first, []).append(proposal)
        else:
            self._ended[id] = duplicate
            self._tell(id, None if ended.status == "failed" else ended.metrics)
        return None

    def _replay(self, again: Callable[[Event], None]) -> tuple[int, list[tuple[str, dict[str, KnobValue]]]]:
        """Ask and tell the search what it was asked and told before; returns how many it proposed, and what is open."""
        open_: dict[str, dict[str, KnobValue]] = {}
        count, differs = 0, False
        for event in list(self._search_log.events):
            if event.kind == "asked":
                count += 1
                differs |= self._search.suggest(event.id) != event.knobs
                open_[event.id] = self._knobs[event.id] = event.knobs
            elif event.kind == "reported" and event.metrics is not None:
                self._search.on_trial_result(event.id, event.metrics)
            elif event.kind == "told":
                open_.pop(event.id, None)
                self.ended_before[event.id] = event.metrics
                self._search.on_trial_complete(event.id, event.metrics, error=event.metrics is None)
            again(event)
        if differs:
            log.warning(
                "the search proposes other knobs than before (other versions of its library, or another space or "
                "seed); it goes on with what it was told"
            )
        return count, list(open_.items())


def trial_id(number: int) -> str:
    """The id of the ``number``-th trial that a search proposes, from 1; those of ``sweep.start`` come first."""
    return f"{number:04d}"


def metrics_in(result: Mapping[str, str | float]) -> dict[str, float]:
    """The metrics that a trial reported, without what Ray adds to them."""
    return {
        name.removeprefix(METRICS_PREFIX): float(v) for name, v in result.items() if name.startswith(METRICS_PREFIX)
    }


METRICS_PREFIX = "metrics/"
"""In front of a metric's name in what Ray is told, which has many names of its own."""


def _duplicate(proposal: Proposal, first: str, ended: Trial | None) -> Trial:
    now = time.time()
    duplicate = Trial(**described(proposal), status="duplicate", of=first, started=now, ended=now)
    if ended is None:
        return duplicate
    same = {name: getattr(ended, name) for name in ("metrics", "layer_bits", "ends", "images")}
    return replace(duplicate, **same)
