"""The books of a sweep: its folder, for one command at a time, and what became of each trial."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

from qtrain.pipeline.run_lock import only_run_in
from qtrain.settings.run_files import TRIALS, read_config, write_config
from qtrain.settings.run_identity import hash_of, recorded
from qtrain.settings.run_settings import RunSettings
from qtrain.sweep.make_search import objectives_of
from qtrain.sweep.pareto import Objectives
from qtrain.sweep.proposals import Proposals
from qtrain.sweep.run_trial import described, read_trial
from qtrain.sweep.search_log import SEARCH
from qtrain.sweep.sweep_results import RUNS, SWEEP
from qtrain.sweep.trial import Trial, append_trial, read_trials
from qtrain.utils.errors import ConfigError

SAME = ("space", "start", "objectives", "search", "scheduler", "workers", "val_fraction")
"""Keys of ``sweep`` that two commands share exactly if one may go on with the sweep of the other."""


@final
class TrialStore:
    """What is known of the sweep in ``folder``: ``trials`` that have ended, by id."""

    def __init__(self, folder: Path, objectives: Objectives) -> None:
        self.folder, self.objectives = folder, objectives
        self.trials: dict[str, Trial] = {trial.id: trial for trial in read_trials(folder)}

    @classmethod
    @contextmanager
    def of(cls, settings: RunSettings, overrides: Sequence[str], folder: Path) -> Iterator["TrialStore"]:
        """The trial store of the sweep ``settings`` in ``folder``, which no other command may use meanwhile.

        Raises ``ConfigError`` where one does, or where the folder holds a sweep of another config and ``overwrite`` is
        false. With ``overwrite``, or without ``resume``, what is there goes.
        """
        with only_run_in(folder):
            _claim(settings, overrides, folder)
            yield cls(folder, objectives_of(settings))

    @property
    def begun(self) -> bool:
        """Whether an earlier command has asked for trials."""
        return (self.folder / SEARCH).is_file()

    @property
    def path(self) -> Path:
        return self.folder / TRIALS

    @property
    def runs(self) -> Path:
        """The folder of the trials' runs, each named by its key."""
        return self.folder / RUNS

    def write(self, trial: Trial) -> None:
        """Keep what became of ``trial``."""
        append_trial(self.folder, trial)
        self.trials[trial.id] = trial

    def complete(self, proposals: Proposals) -> None:
        """Write what a killed command did not come to write of trials that had ended."""
        for id in proposals.ended_before.keys() - self.trials.keys():
            proposal = proposals.proposal_of(id)
            if (ended := read_trial(self.runs / proposal.key)) is None:
                metrics = proposals.ended_before[id] or {}
                ended = Trial(**described(proposal), status="stopped", reason="by the scheduler", metrics=metrics)
            self.write(ended)


def _claim(settings: RunSettings, overrides: Sequence[str], folder: Path) -> None:
    afresh = settings.overwrite or not settings.resume
    # A sweep that failed before its first trial has nothing to lose, and must not block its folder.
    begun = any((folder / name).is_file() for name in (TRIALS, SEARCH))
    if (
        (folder / SWEEP).is_file()
        and begun
        and not afresh
        and _identity(read_config(folder / SWEEP)) != _identity(settings.plain)
    ):
        raise ConfigError(
            f"run_dir: {folder} holds a sweep of another config; choose another name=..., or overwrite=true to "
            "replace it"
        )
    if afresh:
        for name in (TRIALS, SEARCH):
            (folder / name).unlink(missing_ok=True)
        for name in (RUNS, "ray"):
            shutil.rmtree(folder / name, ignore_errors=True)
    write_config(folder / SWEEP, {**settings.plain, "overrides": list(overrides)})


def sweep_hash(settings: RunSettings) -> str:
    """A hash that two commands share exactly if one may go on with the sweep of the other."""
    return hash_of(_identity(settings.plain), ignore=())


def _identity(plain: Mapping[str, Any]) -> dict[str, Any]:
    sweep = plain.get("sweep") or {}
    ignored = ("name", "output", "resume", "overwrite", "results", "report", "logger", "overrides", "allow_targets")
    return {
        **{key: value for key, value in recorded(plain).items() if key not in ignored},
        "sweep": {key: sweep.get(key) for key in SAME},
    }
