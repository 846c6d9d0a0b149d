"""Ray Tune as the engine of a sweep: workers that are reused, trials that report and are taken up again."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, final

from ray import tune
from ray.tune import Callback, Stopper
from ray.tune.schedulers import TrialScheduler

from qtrain.pipeline.run_cache import RunCache
from qtrain.sweep.proposals import METRICS_PREFIX, Proposals
from qtrain.sweep.run_trial import Proposal, ProposalFields, described, read_trial, reason_of, run_trial
from qtrain.sweep.running import Display, Running
from qtrain.sweep.searcher import EPOCHS
from qtrain.sweep.trial import Status, Trial
from qtrain.sweep.trial_configs import read_trial_config
from qtrain.sweep.trial_workers import WorkerSettings, run_with_workers
from qtrain.utils.signals import SignalNote

if TYPE_CHECKING:
    from ray.tune.experiment import Trial as RayTrial

log = logging.getLogger(__name__)

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",    # trials write their own records
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",   # a trial that failed has no metrics
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_MAX_PENDING_TRIALS_PG": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "600",            # Ray's own state, which nobody reads back
    "RAY_AIR_NEW_OUTPUT": "0",
}  # fmt: skip
"""What Ray is told by the environment, where the user says nothing else."""

NEXT_TO_NOTHING = {"memory": 1.0}
"""Bytes of a process that only waits for others; Ray wants some resource for each."""

_STORE = RunCache()
"""What this worker keeps between its trials."""


class TrialConfig(TypedDict):
    """What Ray gives a worker: the fields of a proposal."""

    proposal: ProposalFields


def train_trial(config: TrialConfig, setting: WorkerSettings) -> None:
    """What a worker of Ray does for one trial: the run, its reports, and at the end how it ended."""
    proposal = Proposal(**config["proposal"])
    if Path(setting.cwd).is_dir():
        os.chdir(setting.cwd)
    plain = read_trial_config(Path(setting.folder) / proposal.key, name=proposal.id, knobs=proposal.knobs)
    settings = setting.read(plain)

    def report(metrics: dict[str, float]) -> None:
        tune.report(told(metrics))

    if setting.workers > 1:
        trial = run_with_workers(settings, proposal, setting)
    else:
        _STORE.most_bytes = setting.cache_bytes
        trial = run_trial(settings, proposal, report=report, store=_STORE, threads=setting.threads)
    # Ray asks no more of a trial that says it is done, which spares a worker two messages before its next one.
    tune.report({**told(trial.metrics), EPOCHS: trial.epochs, "status": trial.status, "done": True})


def told(metrics: Mapping[str, float]) -> dict[str, float | dict[str, float]]:
    """``metrics`` for Ray: under their own names for the rule that stops trials, and apart from Ray's for us."""
    return {**metrics, METRICS_PREFIX.rstrip("/"): dict(metrics)}


@final
class Record(Callback):
    """Writes down what became of each trial, and shows the sweep as it is.

    ``record`` takes a trial that has ended, ``trials`` gives all that have; ``proposals`` knows the trials' ids.
    """

    def __init__(
        self,
        *,
        proposals: Proposals,
        folder: Path,
        record: Callable[[Trial], None],
        trials: Callable[[], list[Trial]],
        table: Display,
        epochs: float,
        threads: int,
        every_s: float = 1.0,
    ) -> None:
        self._proposals, self._folder = proposals, folder
        self._record, self._trials, self._table = record, trials, table
        self._epochs, self._threads, self._every_s = epochs, threads, every_s
        self._running: dict[str, Running] = {}
        self._begun: dict[str, float] = {}
        self._last = 0.0

    def __getstate__(self) -> dict[str, object]:
        """Nothing: Ray writes down what it is given, and nobody reads that back."""
        return {}

    def on_trial_start(self, iteration: int, trials: list[RayTrial], trial: RayTrial, **info: object) -> None:
        proposal = self._of(trial)
        self._begun.setdefault(proposal.id, time.time())
        self._see(proposal, {})

    def on_trial_result(
        self, iteration: int, trials: list[RayTrial], trial: RayTrial, result: dict[str, Any], **info: object
    ) -> None:
        self._see(self._of(trial), result.get(METRICS_PREFIX.rstrip("/"), {}))

    def on_trial_complete(self, iteration: int, trials: list[RayTrial], trial: RayTrial, **info: object) -> None:
        proposal = self._of(trial)
        ended = read_trial(self._folder / proposal.key) if "status" in trial.last_result else None
        if ended is None:
            metrics = trial.last_result.get(METRICS_PREFIX.rstrip("/"), {})
            ended = self._without_end(proposal, "stopped", "by the scheduler: others were better", metrics)
        self._end(ended)

    def on_trial_error(self, iteration: int, trials: list[RayTrial], trial: RayTrial, **info: object) -> None:
        error = trial.get_pickled_error()
        reason = "its worker died" if error is None else _first_line(reason_of(error))
        times = trial.num_failures
        self._end(
            self._without_end(self._of(trial), "failed", f"{reason} ({times} times)" if times > 1 else reason, {})
        )

    def on_step_end(self, iteration: int, trials: list[RayTrial], **info: object) -> None:
        if time.monotonic() - self._last >= self._every_s:
            self._last = time.monotonic()
            self._table.update(self._trials(), list(self._running.values()))

    def unfinished(self, reason: str) -> None:
        """Write down the trials that were stopped together with the sweep; the next command goes on with them."""
        for id in list(self._running):
            run = self._running[id]
            self._end(self._without_end(self._proposals.proposals[id], "stopped", reason, dict(run.metrics)))

    def _of(self, trial: RayTrial) -> Proposal:
        return Proposal(**trial.config["proposal"])

    def _see(self, proposal: Proposal, metrics: dict[str, float]) -> None:
        self._running[proposal.id] = Running(
            id=proposal.id,
            knobs=proposal.knobs,
            epoch=metrics.get(EPOCHS, 0.0),
            epochs=self._epochs,
            metrics=metrics,
            started=self._begun.get(proposal.id, 0.0),
        )

    def _end(self, trial: Trial) -> None:
        self._running.pop(trial.id, None)
        self._record(trial)
        self._table.update(self._trials(), list(self._running.values()))

    def _without_end(self, proposal: Proposal, status: Status, reason: str, metrics: dict[str, float]) -> Trial:
        """What the driver knows of a trial that could not tell of its end."""
        begun, now = self._begun.get(proposal.id, time.time()), time.time()
        return Trial(
            **described(proposal),
            status=status,
            reason=reason,
            metrics={name: value for name, value in metrics.items() if name != EPOCHS},
            epochs=metrics.get(EPOCHS, 0.0),
            train_s=now - begun,
            started=begun,
            ended=now,
            threads=self._threads,
        )


@final
class EndOfSweep(Stopper):
    """Stops all trials after a signal that comes inside ``with end.note``, or once ``left_s`` seconds are over."""

    def __init__(self, left_s: float | None) -> None:
        self._until = None if left_s is None else time.monotonic() + left_s
        self.note = SignalNote((signal.SIGINT, signal.SIGTERM), what="stopping the trials")

    def __call__(self, trial_id: str, result: Mapping[str, object]) -> bool:
        return False

    @property
    def signum(self) -> signal.Signals | None:
        """The signal that came, if one did."""
        return self.note.signum

    @property
    def out_of_time(self) -> bool:
        return self._until is not None and time.monotonic() >= self._until

    def stop_all(self) -> bool:
        return self.signum is not None or self.out_of_time


def run_trials(
    proposals: Proposals,
    *,
    rule: TrialScheduler | None,
    record: Record,
    end: EndOfSweep,
    setting: WorkerSettings,
    place: Mapping[str, float],
) -> None:
    """Run what is proposed until nothing is, or until ``end``.

    ``place`` is what Ray keeps for a trial besides the resources of its workers.
    """
    alone = setting.workers == 1
    bundle = {**place, **(setting.resources if alone else {})} or NEXT_TO_NOTHING
    trainable = tune.with_parameters(train_trial, setting=setting)
    tuner = tune.Tuner(
        tune.with_resources(trainable, tune.PlacementGroupFactory([bundle])),
        tune_config=tune.TuneConfig(
            search_alg=proposals,
            scheduler=rule,
            num_samples=-1,
            reuse_actors=alone,
            trial_name_creator=_name,
            trial_dirname_creator=_name,
        ),
        run_config=tune.RunConfig(
            name=time.strftime("%Y%m%dT%H%M%S"),
            storage_path=setting.storage,
            stop=end,
            callbacks=[record],
            failure_config=tune.FailureConfig(max_failures=setting.max_failures),
            verbose=0,
        ),
    )
    with end.note:
        tuner.fit()


def _name(trial: RayTrial) -> str:
    return str(trial.config["proposal"]["id"])


def _first_line(text: str) -> str:
    return text if len(text) <= 300 else text[:299] + "…"
