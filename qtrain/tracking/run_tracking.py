"""Opens and closes a run's loggers, and gives W&B what is not a row of metrics.

Rows of metrics come from the metric log. This file adds bits, costs, and the files that the run used and made. Only
W&B gets these; next to ``metrics.jsonl`` they are in ``summary.json``.
"""

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
"""The type of W&B artifacts that hold weights."""

LONG = ("layers", "right", "fp_right")
"""Fields of a summary that are no figures to look at."""


@contextmanager
def open_loggers(settings: RunSettings, folder: Path) -> Iterator[tuple[Logger, ...]]:
    """The loggers that ``settings.logger`` names, for the run in ``folder``; the end of the block closes them."""
    made = [chosen.build()(folder=folder, config=recorded(settings.plain)) for chosen in settings.logger.values()]
    # What makes a logger may return None if there is nothing to log to.
    loggers = tuple(logger for logger in made if logger is not None)
    try:
        yield loggers
    except BaseException as error:
        close(loggers, error=error)
        raise
    close(loggers)


def tell_student(loggers: Sequence[Logger], described: Mapping[str, Any]) -> None:
    """Log the student's costs and the bits of its layers, before training, so that failed trials have them too.

    ``described`` are fields of a run's summary, including the rows of layers.
    """
    for run in _wandb_runs(loggers):
        run.summarize({name: value for name, value in described.items() if name != "layers"})
        run.log_layers(described["layers"])


def tell_source(loggers: Sequence[Logger], weights: str | None) -> None:
    """Log the file of full-precision weights from which the student starts, if it starts from a file."""
    for run in _wandb_runs(loggers):
        _use(run, weights)


def tell_teacher(loggers: Sequence[Logger], weights: Callable[[], Sequence[str | None]]) -> None:
    """Log the files of the ``weights`` of the teacher or its members; weights of a package have no file."""
    if runs := _wandb_runs(loggers):
        for path in weights():
            for run in runs:
                _use(run, path)


def tell_outcome(loggers: Sequence[Logger], student: Path, summary: Mapping[str, Any]) -> None:
    """Log the run's ``summary`` at its end, and the file ``student`` as an artifact with the summary's metrics."""
    metrics = {name: value for name, value in summary.items() if name not in LONG}
    for run in _wandb_runs(loggers):
        run.summarize(metrics)
        name = student_name(summary.get("experiment"), student.parent)
        run.keep_files({student.name: student}, name=name, kind=MODEL, about=metrics)


def student_name(experiment: str | None, folder: Path) -> str:
    """The name of the artifact of the student of the run in ``folder``."""
    return f"student-{experiment}-{folder.name}" if experiment else f"student-{folder.name}"


def weights_name(path: Path) -> str:
    """The name of an artifact of full-precision weights; for a cached file its folder's name, which describes it."""
    return path.parent.name if path.stem == "model" else path.stem


def _use(run: WandbRun, weights: str | None) -> None:
    path = Path(weights).expanduser() if weights else None
    if path is not None and path.is_file():
        run.use_files({path.name: path}, name=weights_name(path), kind=MODEL)


def _wandb_runs(loggers: Sequence[Logger]) -> list[WandbRun]:
    return [logger for logger in loggers if isinstance(logger, WandbRun)]
