"""Between Ray and the rule that stops trials early: the rule sees trials by their ids in the sweep.

So it judges a trial that another command has begun as the one it knows, and can be told what earlier commands saw.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, final

from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from qtrain.sweep.search_log import Event
from qtrain.sweep.searcher import EPOCHS

if TYPE_CHECKING:
    from ray.tune.execution.tune_controller import TuneController
    from ray.tune.experiment import Trial as RayTrial


class Known(NamedTuple):
    """What a rule may look at of a trial."""

    trial_id: str


@final
class EarlyStopping(FIFOScheduler):
    """Asks ``rule`` about the metric ``metric`` of each trial, whose id in the sweep ``name`` gives.

    A rule stops a trial or lets it go on: one that pauses it would have it begin anew. One that ``spares``
    holds for is not stopped, and the rule looks at it all the same.
    """

    def __init__(
        self,
        rule: TrialScheduler,
        *,
        metric: str,
        name: Callable[[RayTrial], str],
        spares: Callable[[RayTrial], bool] = lambda trial: False,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._rule: Any = rule  # which is given less than Ray's types say, and looks at no more
        self._metric, self._name, self._spares = metric, name, spares
        # What a rule looks at of Ray's loop: no trial waits, for which another would have to pause.
        self._loop = SimpleNamespace(get_live_trials=list)
        self._known: dict[str, Known] = {}
        self.stopped: set[str] = set()

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: object) -> bool:
        return True  # the rule knows its metric by itself

    def again(self, event: Event) -> None:
        """Tell the rule what an earlier command saw."""
        if event.kind == "reported" and event.metrics is not None:
            self._judge(event.id, event.metrics)
        elif event.kind == "told" and event.id in self._known:
            self._end(event.id, event.metrics or {})

    def on_trial_result(self, tune_controller: TuneController, trial: RayTrial, result: Mapping[str, object]) -> str:
        id = self._name(trial)
        # What has ended is not judged: its student is there.
        decision = TrialScheduler.CONTINUE if "status" in result else self._judge(id, result)
        if decision != TrialScheduler.STOP or self._spares(trial):
            return TrialScheduler.CONTINUE
        self.stopped.add(id)
        return TrialScheduler.STOP

    def on_trial_complete(self, tune_controller: TuneController, trial: RayTrial, result: Mapping[str, object]) -> None:
        self._end(self._name(trial), result)

    def _judge(self, id: str, metrics: Mapping[str, object]) -> str:
        if self._metric not in metrics or EPOCHS not in metrics:
            return TrialScheduler.CONTINUE
        if id not in self._known:
            self._known[id] = Known(id)
            self._rule.on_trial_add(self._loop, self._known[id])
        decision: str = self._rule.on_trial_result(self._loop, self._known[id], metrics)
        return decision

    def _end(self, id: str, metrics: Mapping[str, object]) -> None:
        if id in self._known and self._metric in metrics and EPOCHS in metrics:
            self._rule.on_trial_complete(self._loop, self._known[id], metrics)
