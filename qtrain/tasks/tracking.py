"""Floor 6: a run's loggers, from its first step to what it leaves: opened, told what they should know, ended."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from omegaconf import DictConfig
from pytorch_lightning.loggers import Logger

from qtrain.lit.loggers import close
from qtrain.tasks.instantiate import instantiate
from qtrain.tasks.overlay import plain_config


@contextmanager
def open_loggers(cfg: DictConfig, folder: Path) -> Iterator[tuple[Logger, ...]]:
    """The loggers that ``cfg.logger`` names, for the run in ``folder``; ended, whatever happens, with the block."""
    made = [make(folder=folder, config=plain_config(cfg)) for make in instantiate(cfg.logger).values()]
    # A logger's maker may decide that there is nothing to log to (no wandb, mode=disabled).
    loggers = tuple(logger for logger in made if logger is not None)
    failed = True
    try:
        yield loggers
        failed = False
    finally:
        close(loggers, failed=failed)
