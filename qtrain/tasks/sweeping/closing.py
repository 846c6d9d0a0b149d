"""Floor 6: what a sweep ends with: the front's models on the test images, tables, page and pictures, and W&B."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from qtrain.lit.evaluation import evaluate
from qtrain.sweep.pareto import front
from qtrain.sweep.trials import Trial
from qtrain.tasks import record
from qtrain.tasks.evaluate import trained_student
from qtrain.tasks.load import load_data
from qtrain.tasks.stages import last_stage
from qtrain.tasks.sweeping.ledger import Ledger
from qtrain.tasks.sweeping.live import print_front
from qtrain.tasks.sweeping.page import write_sweep_report
from qtrain.tasks.sweeping.spending import spending
from qtrain.tasks.sweeping.starts import is_start
from qtrain.tasks.tracking import tell_sweep

log = logging.getLogger(__name__)

TEST = "test_top1"
"""Figure of a trial of the front, or of the start: accuracy on the test images, in percent. No search has seen it."""


def test_front(cfg: DictConfig, ledger: Ledger) -> None:
    """Evaluate each model of the front, and those that the sweep was told to start with, on the test images, once.

    What comes of it is the trial's ``test_top1``.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wanted = {trial.id: trial for trial in [*front(ledger.trials.values(), ledger.objectives), *starts(cfg, ledger)]}
    models = [trial for trial in wanted.values() if TEST not in trial.figures]
    for number, trial in enumerate(models, start=1):
        log.info("test images: model %d of %d", number, len(models))
        folder = ledger.runs / trial.key
        run = OmegaConf.load(folder / record.CONFIG)
        assert isinstance(run, DictConfig)
        run = last_stage(run)
        data = load_data(run)
        top1 = evaluate(trained_student(run, folder, data).student, data.test_dataloader(), device)["top1"]
        ledger.write(replace(trial, figures={**trial.figures, TEST: top1}))


def starts(cfg: DictConfig, ledger: Ledger) -> list[Trial]:
    """The trials that the sweep was told to start with and that came to their end."""
    return [t for t in ledger.trials.values() if t.status == "finished" and is_start(cfg, t.id, t.knobs)]


def show(cfg: DictConfig, ledger: Ledger) -> dict[str, Any]:
    """Print the front, write the page, tell W&B; returns how many trials ended how, and each objective's best value."""
    trials = list(ledger.trials.values())
    print_front(trials, ledger.objectives, space=cfg.sweep.space)
    spent = spending(trials, cfg.fit.epochs)
    print(
        f"\n{spent.counted()}; {spent.epochs:g} epochs, full training of all {spent.full_epochs:g} ({spent.share:.0%})"
    )
    print(f"sweep: {write_sweep_report(ledger.folder)}")
    tell_sweep(cfg, ledger.folder, ledger.runs, ledger.objectives)
    figures: dict[str, Any] = {status: count for status, count in spent.counts.items()}
    best = front(trials, ledger.objectives)
    figures["front"] = len(best)
    for name, way in ledger.objectives.items():
        if values := [trial.figures[name] for trial in best]:
            figures[f"best/{name}"] = max(values) if way == "max" else min(values)
    return figures
