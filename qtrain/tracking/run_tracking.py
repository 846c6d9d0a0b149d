"""A run's loggers, from its first step to what it leaves: opened, told what they should know, ended.

Rows of metrics come to them from the metric log. What this file tells is what a row cannot: bits, costs, and the files
that the run was made from and that it made. Only W&B wants to know; ``metrics.jsonl`` has ``summary.json`` beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger

from qtrain.settings.run_identity import recorded
from qtrain.settings.run_settings import RunSettings
from qtrain.tracking.loggers import close
from qtrain.tracking.wandb_run import WandbRun

MODEL = "model"
"""What weights are in W&B, whoever's: an artifact's type."""


@contextmanager
def open_loggers(settings: RunSettings, folder: Path) -> Iterator[tuple[Logger, ...]]:
    """The loggers that ``settings.logger`` names, for the run in ``folder``; the block's end ends them in any case."""
    made = [chosen.build()(folder=folder, config=recorded(settings.plain)) for chosen in settings.logger.values()]
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


def tell_teacher(loggers: Sequence[Logger], weights: Callable[[], Sequence[str | None]]) -> None:
    """The files of the teacher's ``weights``, or of its members'; one that a package brings along has none."""
    if runs := _wandb_runs(loggers):
        for path in weights():
            for run in runs:
                _use(run, path)


def tell_outcome(loggers: Sequence[Logger], student: Path, summary: Mapping[str, Any]) -> None:
    """At the end: the run's ``summary``, and the file ``student`` as an artifact that has the summary's metrics beside
    it.
    """
    metrics = {name: value for name, value in summary.items() if name != "layers"}
    for run in _wandb_runs(loggers):
        run.summarize(metrics)
        name = student_name(summary.get("experiment"), student.parent)
        run.keep_files({student.name: student}, name=name, kind=MODEL, about=metrics)


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
