"""A run's loggers, from its first step to what it leaves: opened, told what they should know, ended.

Rows of metrics come to them from the metric log. What this file tells is what a row cannot: bits, costs, and the files
that the run was made from and that it made. Only W&B wants to know; ``metrics.jsonl`` has ``summary.json`` beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.loggers import Logger

from qtrain.config.instantiate import instantiate
from qtrain.data.base import VisionData
from qtrain.pipeline.pretrain import full_precision_weights
from qtrain.pipeline.run_folder import STUDENT
from qtrain.settings.run_identity import plain_config
from qtrain.sweep.pareto import Objectives
from qtrain.sweep.trial import Trial
from qtrain.sweep.wandb_sweep import log_sweep
from qtrain.tracking.loggers import close
from qtrain.tracking.wandb_run import WandbRun

MODEL = "model"
"""What weights are in W&B, whoever's: an artifact's type."""


@contextmanager
def open_loggers(cfg: DictConfig, folder: Path) -> Iterator[tuple[Logger, ...]]:
    """The loggers that ``cfg.logger`` names, for the run in ``folder``; ended, whatever happens, with the block."""
    made = [make(folder=folder, config=plain_config(cfg)) for make in instantiate(cfg.logger).values()]
    # A logger's maker may decide that there is nothing to log to.
    loggers = tuple(logger for logger in made if logger is not None)
    try:
        yield loggers
    except BaseException as error:
        close(loggers, error=error)
        raise
    close(loggers)


def tell_student(loggers: Sequence[Logger], described: Mapping[str, Any]) -> None:
    """Before it is trained: what the student costs, and the bits of its layers. Also a trial that fails has these.

    ``described`` are fields of a run's summary, the rows of layers among them.
    """
    for run in _wandb_runs(loggers):
        run.summarize({name: value for name, value in described.items() if name != "layers"})
        run.log_layers(described["layers"])


def tell_source(loggers: Sequence[Logger], weights: str | None) -> None:
    """The file of the full-precision weights that the student starts from, if it starts from a file."""
    for run in _wandb_runs(loggers):
        _use(run, weights)


def tell_teacher(loggers: Sequence[Logger], cfg: DictConfig, data: VisionData) -> None:
    """The files of the teacher's weights, or of its members'; one that a package brings along has none."""
    node = cfg.teacher.model
    runs = _wandb_runs(loggers)
    if node is None or not runs:
        return
    for member in node.members.values() if "members" in node else (node,):
        weights = member.get("weights") or full_precision_weights(member, cfg, data)
        for run in runs:
            _use(run, weights)


def tell_outcome(loggers: Sequence[Logger], folder: Path, summary: Mapping[str, Any]) -> None:
    """At the end: the run's ``summary``, and its student as an artifact that has the summary's metrics beside it."""
    metrics = {name: value for name, value in summary.items() if name != "layers"}
    for run in _wandb_runs(loggers):
        run.summarize(metrics)
        name = student_name(summary.get("experiment"), folder)
        run.keep_files({STUDENT: folder / STUDENT}, name=name, kind=MODEL, about=metrics)


def student_name(experiment: str | None, folder: Path) -> str:
    """The name of the artifact that the student of the run in ``folder`` is."""
    return f"student-{experiment}-{folder.name}" if experiment else f"student-{folder.name}"


def weights_name(path: Path) -> str:
    """The name of the artifact that full-precision weights are: a kept file's by its folder, which tells what it is."""
    return path.parent.name if path.stem == "model" else path.stem


def _use(run: WandbRun, weights: str | None) -> None:
    path = Path(weights).expanduser() if weights else None
    if path is not None and path.is_file():
        run.use_files({path.name: path}, name=weights_name(path), kind=MODEL)


def _wandb_runs(loggers: Sequence[Logger]) -> list[WandbRun]:
    return [logger for logger in loggers if isinstance(logger, WandbRun)]


def tell_sweep(cfg: DictConfig, folder: Path, runs: Path, objectives: Objectives) -> None:
    """Log what came of the sweep ``cfg`` in ``folder``, as a run of its own in the group of its trials.

    ``runs`` is the folder of their runs, each named by its trial's key.
    """
    for make in instantiate(cfg.logger).values():
        if getattr(make, "func", None) is not WandbRun:
            continue
        group = sweep_group(cfg, folder)
        config = {**plain_config(cfg), "sweep": OmegaConf.to_container(cfg.sweep, resolve=True)}
        run: WandbRun = make(folder=folder, config=config, group=group, job_type="sweep", name=group)

        def student(trial: Trial) -> tuple[str, Path]:
            return student_name(cfg.experiment, runs / trial.key), runs / trial.key / STUDENT

        log_sweep(run, folder, name=group, objectives=objectives, student=student)
        run.finalize("success")


def sweep_group(config: Mapping[str, Any] | DictConfig, folder: Path) -> str:
    """The group in W&B of the sweep in ``folder``, of this ``config``, and of its trials."""
    return str(config.get("name") or config.get("experiment") or folder.resolve().name)
