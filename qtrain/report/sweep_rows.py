"""A sweep in a results file: a row for each model of its front and of its start, and one of what it spent."""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from qtrain.pipeline.results import append_row, provenance, read_results
from qtrain.report.formatting import bits_text, knobs_text
from qtrain.settings.run_files import RESULTS
from qtrain.sweep.sweep_results import RUNS, TEST, SweepResults
from qtrain.sweep.trial import Trial

TASK = "sweep"


def append_sweep_rows(path: Path, sweep: SweepResults, *, starts: Collection[str], config_hash: str) -> None:
    """Add ``sweep`` to the results file ``path``; rows that stand there already stay as they are.

    ``starts`` are ids of the trials that the sweep was told to begin with, ``config_hash`` is that of the sweep. The
    row of a model is that of its run, with the accuracy on test images as ``top1``. Further columns hold what the sweep
    knows of it: ``sweep``, the sweep's name; ``point``, its place on the front; ``start``, whether it is a start.
    """
    known = {_key(row) for row in read_results(path)} if path.is_file() else set()
    for row in [*_models(sweep, starts), _spent(sweep, config_hash)]:
        if _key(row) not in known:
            append_row(path, row)


def _key(row: Mapping[str, object]) -> tuple[object, ...]:
    return row["config_hash"], row["name"], row.get("sweep")


def _models(sweep: SweepResults, starts: Collection[str]) -> Iterator[dict[str, object]]:
    for trial in sweep.trials:
        if TEST in trial.metrics and (trial.id in sweep.points or trial.id in starts):
            own = {"sweep": sweep.folder.name, "point": sweep.points.get(trial.id), "start": trial.id in starts}
            yield {**read_results(sweep.folder / RUNS / trial.key / RESULTS)[-1], **own, **_model(sweep, trial)}


def _model(sweep: SweepResults, trial: Trial) -> dict[str, object]:
    return {
        "task": TASK,
        "name": trial.id,
        "top1": trial.metrics[TEST],
        "val_top1": trial.metrics["top1"],
        "bits": bits_text(trial),
        "knobs": knobs_text(trial.knobs, sweep.space, width=None),
    }


def _spent(sweep: SweepResults, config_hash: str) -> dict[str, object]:
    spent = sweep.spending
    return {
        **provenance(),
        "config_hash": config_hash,
        "experiment": sweep.config["experiment"],
        "task": TASK,
        "name": TASK,
        "sweep": sweep.folder.name,
        "seed": sweep.config["seed"],
        "epochs": spent.epochs,
        "full_epochs": spent.full_epochs,
        "wall_s": spent.wall_s,
        "overhead_median_s": spent.overhead_median_s,
        "notes": spent.counted(),
    }
