"""A sweep in a results file: a row for each model of its front and of its start, and one of what it spent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from qtrain.pipeline.results import append_row, provenance, read_rows
from qtrain.report.formatting import bits_text, knobs_text
from qtrain.sweep.closing import TEST, starts
from qtrain.sweep.pareto import front
from qtrain.sweep.spending import spending
from qtrain.sweep.trial import Trial
from qtrain.sweep.trial_store import TrialStore, sweep_hash

TASK = "sweep"


def append_rows(cfg: DictConfig, trial_store: TrialStore) -> None:
    """Add the sweep to the file ``cfg.results``, where that names one; what stands there already is left alone.

    The row of a model is that of its run, with the accuracy on test images as ``top1`` and what the sweep knows of it
    in further columns: ``sweep``, the sweep's name; ``point``, its place on the front; ``start``, whether the sweep was
    told to begin with it.
    """
    if not cfg.results:
        return
    path = Path(cfg.results)
    known = {_key(row) for row in read_rows(path)} if path.is_file() else set()
    for row in [*_models(cfg, trial_store), _spent(cfg, trial_store)]:
        if _key(row) not in known:
            append_row(path, row)


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["config_hash"], row["name"], row.get("sweep")


def _models(cfg: DictConfig, trial_store: TrialStore) -> Iterator[dict[str, Any]]:
    points = {
        t.id: place for place, t in enumerate(front(trial_store.trials.values(), trial_store.objectives), start=1)
    }
    begun = {trial.id for trial in starts(cfg, trial_store)}
    for trial in trial_store.trials.values():
        if TEST in trial.metrics and (trial.id in points or trial.id in begun):
            own = {"sweep": trial_store.folder.name, "point": points.get(trial.id), "start": trial.id in begun}
            yield {**_run_of(trial, trial_store), **own, **_told(cfg, trial)}


def _run_of(trial: Trial, trial_store: TrialStore) -> dict[str, str]:
    return read_rows(trial_store.runs / trial.key / "results.csv")[-1]


def _told(cfg: DictConfig, trial: Trial) -> dict[str, Any]:
    return {
        "task": TASK,
        "name": trial.id,
        "top1": trial.metrics[TEST],
        "val_top1": trial.metrics["top1"],
        "bits": bits_text(trial),
        "knobs": knobs_text(trial.knobs, cfg.sweep.space, width=None),
    }


def _spent(cfg: DictConfig, trial_store: TrialStore) -> dict[str, Any]:
    spent = spending(list(trial_store.trials.values()), cfg.fit.epochs)
    return {
        **provenance(),
        "config_hash": sweep_hash(cfg),
        "experiment": cfg.experiment,
        "task": TASK,
        "name": TASK,
        "sweep": trial_store.folder.name,
        "seed": cfg.seed,
        "epochs": spent.epochs,
        "full_epochs": spent.full_epochs,
        "wall_s": spent.wall_s,
        "overhead_median_s": spent.overhead_median_s,
        "notes": spent.counted(),
    }
