"""The task that runs many trials and shows which of them are worth having.

A trial is a run of ``task=train`` whose config differs in the knobs of ``sweep.space``, judged on images held out of
the training images. What is proposed, told and ended is written down as it happens, so that the same command goes on
after a kill at any moment: trials from their resume points, the search from what it knew.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from omegaconf import DictConfig

from qtrain.pipeline.load_data import load_data
from qtrain.pipeline.stages import stages_of
from qtrain.report.live_table import LiveTable, print_front
from qtrain.report.sweep_page import write_sweep_report
from qtrain.report.sweep_rows import append_sweep_rows
from qtrain.sweep import engine
from qtrain.sweep.early_stopping import EarlyStopping
from qtrain.sweep.evaluate_front import evaluate_front, starts
from qtrain.sweep.initial_trials import is_start
from qtrain.sweep.make_search import check_sweep, make_scheduler, make_searcher
from qtrain.sweep.make_space import make_space, rehearse_space
from qtrain.sweep.proposals import Proposals
from qtrain.sweep.ray_cluster import check_folder, check_machines, check_seen_from_all, room, start_ray
from qtrain.sweep.search_log import SearchLog
from qtrain.sweep.space import Space
from qtrain.sweep.sweep_results import read_sweep
from qtrain.sweep.trial_configs import Configs
from qtrain.sweep.trial_store import TrialStore, sweep_hash
from qtrain.tracking.run_tracking import tell_sweep
from qtrain.utils.errors import RunInterruptedError

log = logging.getLogger(__name__)

RAY = "ray"
"""Folder of Ray's own files, which nothing is read back from."""


def run(cfg: DictConfig, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Run the sweep ``cfg``, that ``overrides`` led to; returns how many trials ended how, and the best metrics.

    Raises ``RunInterruptedError`` after a signal, once the trials are stopped; the same command goes on with them.
    """
    check_sweep(cfg)
    folder = Path(cfg.run_dir).resolve()
    storage = Path(cfg.sweep.storage).expanduser().resolve() if cfg.sweep.storage else folder / RAY
    check_folder(folder, "run_dir")
    check_folder(storage, "sweep.storage")
    with TrialStore.of(cfg, overrides, folder) as trial_store:
        space = make_space(cfg, load_data(cfg))
        configs = Configs(cfg, overrides, folder=trial_store.runs)
        if not trial_store.begun:
            rehearse_space(cfg, space, configs.config)
        for name, value in engine.ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        started = start_ray(cfg)
        try:
            interrupted = _run_trials(cfg, space, configs, trial_store, storage)
        finally:
            if started:
                ray.shutdown()
        if interrupted:
            log.warning("%d trials have ended; the same command goes on with the others", len(trial_store.trials))
            raise RunInterruptedError(signum=interrupted, resume_point=trial_store.path)
        if cfg.sweep.test_front:
            evaluate_front(cfg, trial_store)
            if cfg.results:
                append_sweep_rows(
                    Path(cfg.results),
                    read_sweep(folder),
                    starts={trial.id for trial in starts(cfg, trial_store)},
                    config_hash=sweep_hash(cfg),
                )
        metrics = _show(folder)
        tell_sweep(cfg, folder, trial_store.runs, trial_store.objectives)
        return metrics


def _run_trials(cfg: DictConfig, space: Space, configs: Configs, trial_store: TrialStore, storage: Path) -> int | None:
    """Run the trials that are left; returns the signal that stopped them, if one did."""
    resources, place = check_machines(cfg)
    check_seen_from_all(trial_store.folder)
    threads = max(1, int(cfg.sweep.resources.cpu))
    epochs = sum(stage.cfg.fit.share * stage.cfg.fit.epochs for stage in stages_of(cfg, trial_store.folder))
    search = make_searcher(cfg, space)
    scheduler, first = make_scheduler(cfg), next(iter(trial_store.objectives))
    search_log = SearchLog(trial_store.folder)
    spent_s = search_log.spent_s
    left_s = None if cfg.sweep.time_budget_s is None else max(0.0, cfg.sweep.time_budget_s - spent_s)
    judge = None
    if scheduler is not None:
        judge = EarlyStopping(
            scheduler,
            metric=first,
            name=lambda trial: trial.config["proposal"]["id"],
            spares=lambda trial: is_start(cfg, trial.config["proposal"]["id"], trial.config["proposal"]["knobs"]),
        )
    trials = search.trials if search.trials is not None else cfg.sweep.trials
    proposals = Proposals(
        search,
        compose=configs,
        search_log=search_log,
        ended=trial_store.trials,
        record=trial_store.write,
        trials=trials,
        parallel=_parallel(cfg, counted=bool(place)),
        again=judge.again if judge is not None else lambda event: None,
    )
    trial_store.complete(proposals)
    if left_s == 0:
        log.warning("sweep.time_budget_s: earlier commands have spent %.0f s, which is all; give more", spent_s)
        return None
    end = engine.EndOfSweep(left_s)
    title = f"sweep {cfg.experiment or trial_store.folder.name}"
    with LiveTable(
        title=title,
        objectives=trial_store.objectives,
        epochs=epochs,
        space=cfg.sweep.space,
        trials=trials,
        time_budget_s=cfg.sweep.time_budget_s,
        spent_s=spent_s,
    ) as table:
        record = engine.Record(
            proposals=proposals,
            folder=trial_store.runs,
            record=trial_store.write,
            trials=lambda: list(trial_store.trials.values()),
            table=table,
            epochs=epochs,
            threads=threads,
        )
        engine.run_trials(
            proposals,
            rule=judge,
            record=record,
            end=end,
            place=place,
            setting=engine.WorkerSettings(
                folder=str(trial_store.runs),
                storage=str(storage),
                resources=resources,
                threads=threads,
                workers=cfg.sweep.workers,
                max_failures=cfg.sweep.max_failures,
                cwd=os.getcwd(),
            ),
        )
        if end.signum is None and end.out_of_time:
            record.unfinished("the time budget was over")
    return end.signum


def _show(folder: Path) -> dict[str, Any]:
    """Print the front of the sweep in ``folder`` and what it spent, write its page; returns its totals."""
    sweep = read_sweep(folder)
    print_front(sweep.trials, sweep.objectives, space=sweep.space)
    spent = sweep.spending
    print(
        f"\n{spent.counted()}; {spent.epochs:g} epochs, full training of all {spent.full_epochs:g} ({spent.share:.0%})"
    )
    print(f"sweep: {write_sweep_report(folder)}")
    return sweep.totals


def _parallel(cfg: DictConfig, *, counted: bool) -> int | None:
    """How many trials may run at once; ``None`` where Ray finds out, by resources or by places ``counted`` there."""
    most = None if counted else cfg.sweep.parallel
    if cfg.sweep.workers == 1:
        return most
    # What waits for workers of its own takes no resources that Ray could count.
    return min(room(cfg), most or room(cfg))
