"""Many trials of one run: proposed, trained, judged, written down.

A trial is a run of ``task=train`` whose config differs in the knobs of ``sweep.space``, judged on images held out of
the training images. What is proposed, told and ended is written down as it happens, so that the same command goes on
after a kill at any moment: trials from their resume points, the search from what it knew.
"""

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import ray

from qtrain.pipeline.load_data import load_data
from qtrain.settings.run_settings import Compose, Read, RunSettings
from qtrain.sweep import engine
from qtrain.sweep.early_stopping import EarlyStopping
from qtrain.sweep.evaluate_front import evaluate_front
from qtrain.sweep.initial_trials import is_start
from qtrain.sweep.make_search import check_sweep, make_scheduler, make_searcher
from qtrain.sweep.make_space import make_space, rehearse_space
from qtrain.sweep.proposals import Proposals
from qtrain.sweep.ray_cluster import check_folder, check_machines, check_seen_from_all, room, start_ray
from qtrain.sweep.running import Display
from qtrain.sweep.score_prior import prior_points
from qtrain.sweep.search_log import SearchLog
from qtrain.sweep.space import Given, Space
from qtrain.sweep.trial_configs import TrialConfigs
from qtrain.sweep.trial_store import TrialStore
from qtrain.sweep.trial_workers import WorkerSettings
from qtrain.utils.errors import RunInterruptedError

log = logging.getLogger(__name__)

RAY = "ray"
"""Folder of Ray's own files, which nothing is read back from."""

MakeTable = Callable[..., AbstractContextManager[Display]]
"""Opens what shows a sweep while it runs; see ``qtrain.report.live_table.LiveTable``."""


def run_sweep(
    settings: RunSettings, overrides: Sequence[str], *, compose: Compose, read: Read, table: MakeTable
) -> TrialStore:
    """Run the trials of the sweep ``settings``, that ``overrides`` led to, and evaluate the models of its front.

    Raises ``RunInterruptedError`` after a signal, once the trials are stopped; the same command goes on with them.
    """
    check_sweep(settings)
    folder = Path(settings.run_dir).resolve()
    storage = Path(settings.sweep.storage).expanduser().resolve() if settings.sweep.storage else folder / RAY
    check_folder(folder, "run_dir")
    check_folder(storage, "sweep.storage")
    with TrialStore.of(settings, overrides, folder) as trial_store:
        data = load_data(settings)
        space = make_space(settings, data)
        prior = prior_points(settings, space, data)
        configs = TrialConfigs(settings, overrides, folder=trial_store.runs, compose=compose)
        if not trial_store.begun:
            rehearse_space(settings, space, configs.config)
        for name, value in engine.ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        started = start_ray(settings)
        try:
            interrupted = _run_trials(settings, space, prior, configs, trial_store, storage, read=read, table=table)
        finally:
            if started:
                ray.shutdown()
        if interrupted:
            log.warning("%d trials have ended; the same command goes on with the others", len(trial_store.trials))
            raise RunInterruptedError(signum=interrupted, resume_point=trial_store.path)
        if settings.sweep.test_front:
            evaluate_front(settings, trial_store, read=read)
        return trial_store


def _run_trials(
    settings: RunSettings,
    space: Space,
    prior: Sequence[Given],
    configs: TrialConfigs,
    trial_store: TrialStore,
    storage: Path,
    *,
    read: Read,
    table: MakeTable,
) -> int | None:
    """Run the trials that are left; returns the signal that stopped them, if one did."""
    resources, place = check_machines(settings)
    check_seen_from_all(trial_store.folder)
    threads = max(1, int(settings.sweep.resources.cpu))
    epochs = settings.epochs
    search = make_searcher(settings, space, prior)
    scheduler, first = make_scheduler(settings), next(iter(trial_store.objectives))
    search_log = SearchLog(trial_store.folder)
    spent_s = search_log.spent_s
    left_s = None if settings.sweep.time_budget_s is None else max(0.0, settings.sweep.time_budget_s - spent_s)
    judge = None
    if scheduler is not None:
        judge = EarlyStopping(
            scheduler,
            metric=first,
            name=lambda trial: trial.config["proposal"]["id"],
            spares=lambda trial: is_start(settings, trial.config["proposal"]["id"], trial.config["proposal"]["knobs"]),
        )
    trials = search.trials if search.trials is not None else settings.sweep.trials
    proposals = Proposals(
        search,
        compose=configs,
        search_log=search_log,
        ended=trial_store.trials,
        record=trial_store.write,
        trials=trials,
        parallel=_parallel(settings, counted=bool(place)),
        again=judge.again if judge is not None else lambda event: None,
    )
    trial_store.complete(proposals)
    if left_s == 0:
        log.warning("sweep.time_budget_s: earlier commands have spent %.0f s, which is all; give more", spent_s)
        return None
    end = engine.EndOfSweep(left_s)
    title = f"sweep {settings.experiment or trial_store.folder.name}"
    with table(
        title=title,
        objectives=trial_store.objectives,
        epochs=epochs,
        space=settings.sweep.space,
        trials=trials,
        time_budget_s=settings.sweep.time_budget_s,
        spent_s=spent_s,
    ) as shown:
        record = engine.Record(
            proposals=proposals,
            folder=trial_store.runs,
            record=trial_store.write,
            trials=lambda: list(trial_store.trials.values()),
            table=shown,
            epochs=epochs,
            threads=threads,
        )
        engine.run_trials(
            proposals,
            rule=judge,
            record=record,
            end=end,
            place=place,
            setting=WorkerSettings(
                folder=str(trial_store.runs),
                storage=str(storage),
                resources=resources,
                threads=threads,
                workers=settings.sweep.workers,
                max_failures=settings.sweep.max_failures,
                cache_bytes=settings.sweep.cache_gb * 1e9,
                cwd=os.getcwd(),
                read=read,
            ),
        )
        if end.signum is None and end.out_of_time:
            record.unfinished("the time budget was over")
    return end.signum


def _parallel(settings: RunSettings, *, counted: bool) -> int | None:
    """How many trials may run at once; ``None`` where Ray finds out, by resources or by places ``counted`` there."""
    most = None if counted else settings.sweep.parallel
    if settings.sweep.workers == 1:
        return most
    # What waits for workers of its own takes no resources that Ray could count.
    return min(room(settings), most or room(settings))
