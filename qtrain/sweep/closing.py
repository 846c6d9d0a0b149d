"""What a sweep ends with: the front's models on the test images, tables, page and pictures, and W&B."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from qtrain.pipeline import run_folder
from qtrain.pipeline.load_data import load_data
from qtrain.pipeline.stages import last_stage
from qtrain.report.live_table import print_front
from qtrain.report.sweep_page import write_sweep_report
from qtrain.sweep.initial_trials import is_start
from qtrain.sweep.pareto import front
from qtrain.sweep.spending import spending
from qtrain.sweep.trial import Trial
from qtrain.sweep.trial_store import TrialStore
from qtrain.tasks.evaluate import trained_student
from qtrain.tracking.run_tracking import tell_sweep
from qtrain.training.evaluation import evaluate

log = logging.getLogger(__name__)

TEST = "test_top1"
"""Figure of a trial of the front, or of the start: accuracy on the test images, in percent. No search has seen it."""


def test_front(cfg: DictConfig, trial_store: TrialStore) -> None:
    """Evaluate each model of the front, and those that the sweep was told to start with, on the test images, once.

    What comes of it is the trial's ``test_top1``.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wanted = {
        trial.id: trial
        for trial in [*front(trial_store.trials.values(), trial_store.objectives), *starts(cfg, trial_store)]
    }
    models = [trial for trial in wanted.values() if TEST not in trial.metrics]
    for number, trial in enumerate(models, start=1):
        log.info("test images: model %d of %d", number, len(models))
        folder = trial_store.runs / trial.key
        run = OmegaConf.load(folder / run_folder.CONFIG)
        assert isinstance(run, DictConfig)
        run = last_stage(run)
        data = load_data(run)
        top1 = evaluate(trained_student(run, folder, data).student, data.test_dataloader(), device)["top1"]
        trial_store.write(replace(trial, metrics={**trial.metrics, TEST: top1}))


def starts(cfg: DictConfig, trial_store: TrialStore) -> list[Trial]:
    """The trials that the sweep was told to start with and that came to their end."""
    return [t for t in trial_store.trials.values() if t.status == "finished" and is_start(cfg, t.id, t.knobs)]


def show(cfg: DictConfig, trial_store: TrialStore) -> dict[str, Any]:
    """Print the front, write the page, tell W&B; returns how many trials ended how, and each objective's best value."""
    trials = list(trial_store.trials.values())
    print_front(trials, trial_store.objectives, space=cfg.sweep.space)
    spent = spending(trials, cfg.fit.epochs)
    print(
        f"\n{spent.counted()}; {spent.epochs:g} epochs, full training of all {spent.full_epochs:g} ({spent.share:.0%})"
    )
    print(f"sweep: {write_sweep_report(trial_store.folder)}")
    tell_sweep(cfg, trial_store.folder, trial_store.runs, trial_store.objectives)
    metrics: dict[str, Any] = {status: count for status, count in spent.counts.items()}
    best = front(trials, trial_store.objectives)
    metrics["front"] = len(best)
    for name, way in trial_store.objectives.items():
        if values := [trial.metrics[name] for trial in best]:
            metrics[f"best/{name}"] = max(values) if way == "max" else min(values)
    return metrics
