"""A run's folder belongs to one run at a time, and a finished run is not repeated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from omegaconf import DictConfig

from qtrain.pipeline import run_folder
from qtrain.pipeline.run_lock import only_run_in
from qtrain.pipeline.summary import RunSummary


@contextmanager
def claimed(cfg: DictConfig, folder: Path) -> Iterator[RunSummary | None]:
    """Hold ``folder`` for the run of ``cfg`` while the block runs; yields ``None``, or the summary of a finished run.

    With a summary there is nothing left to do, and the block writes nothing. Raises ``ConfigError`` where the folder
    holds a run of another config, and where another process is working in it.
    """
    if (finished := run_folder.finished_run(cfg, folder)) is not None:
        yield finished
        return
    with only_run_in(folder):
        # Asked again under the lock: another process may have finished the run since.
        yield run_folder.claim_folder(cfg, folder)
