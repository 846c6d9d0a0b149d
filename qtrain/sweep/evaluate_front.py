"""The front's models on the test images, once, at the end of a sweep."""

import logging
from dataclasses import replace

import torch

from qtrain.pipeline.load_data import load_data
from qtrain.pipeline.memory_format import settle_memory_format_
from qtrain.pipeline.student_file import load_trained
from qtrain.settings.run_files import STUDENT
from qtrain.settings.run_settings import Read, RunSettings
from qtrain.sweep.initial_trials import is_start
from qtrain.sweep.pareto import front
from qtrain.sweep.sweep_results import TEST
from qtrain.sweep.trial import Trial
from qtrain.sweep.trial_configs import read_trial_config
from qtrain.sweep.trial_store import TrialStore
from qtrain.training.evaluation import evaluate

log = logging.getLogger(__name__)


def evaluate_front(settings: RunSettings, trial_store: TrialStore, *, read: Read) -> None:
    """Evaluate each model of the front, and those that the sweep was told to start with, on the test images, once.

    What comes of it is the trial's ``test_top1``.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wanted = {
        trial.id: trial
        for trial in [*front(trial_store.trials.values(), trial_store.objectives), *starts(settings, trial_store)]
    }
    models = [trial for trial in wanted.values() if TEST not in trial.metrics]
    for number, trial in enumerate(models, start=1):
        log.info("test images: model %d of %d", number, len(models))
        folder = trial_store.runs / trial.key
        run = read(read_trial_config(folder, name=trial.id, knobs=trial.knobs)).fits[-1]
        data = load_data(run)
        _, student = load_trained(run, folder / STUDENT)
        settle_memory_format_(run, student, data)
        top1 = evaluate(student, data.test_dataloader(), device).top1
        trial_store.write(replace(trial, metrics={**trial.metrics, TEST: top1}))


def starts(settings: RunSettings, trial_store: TrialStore) -> list[Trial]:
    """The trials that the sweep was told to start with and that came to their end."""
    return [t for t in trial_store.trials.values() if t.status == "finished" and is_start(settings, t.id, t.knobs)]
