"""The run that a new one replaces in its folder: set aside at first, and back in its place if the new one never began.

A mistake in a command is often found after the folder was made ready. It must not cost the student that was there.
"""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pytorch_lightning.utilities import rank_zero_only

from qtrain.settings.run_files import CHECKPOINTS, CONFIG, EXAMPLES, FORMER, LATENT, METRICS, STAGES, STUDENT, SUMMARY
from qtrain.tracking.wandb_client import RUN_ID

log = logging.getLogger(__name__)

OWN = (CONFIG, SUMMARY, METRICS, RUN_ID, STUDENT, LATENT, EXAMPLES, STAGES, CHECKPOINTS)
"""What is set aside. Rows of results and the log go on from run to run."""


def has_begun(folder: Path) -> bool:
    """Whether the run in ``folder`` has something to lose: a summary, a resume point, or a stage."""
    return (folder / SUMMARY).is_file() or any(folder.glob(f"{CHECKPOINTS}/*.ckpt")) or (folder / STAGES).is_dir()


@rank_zero_only
def set_aside(folder: Path) -> None:
    """Move the run in ``folder`` out of the way. One that waits already stays, and this one is given up for it."""
    former = folder / FORMER
    if former.is_dir() or not has_begun(folder):
        _remove(folder)
        return
    former.mkdir()
    _move(folder, former)


@rank_zero_only
def bring_back(folder: Path) -> None:
    """Put the run that waits in ``folder``, if one does, in the place of one that has not begun."""
    former = folder / FORMER
    if former.is_dir() and not has_begun(folder):
        _remove(folder)
        _move(former, folder)
        former.rmdir()
        log.info("%s holds the run that was there before", folder)


@contextmanager
def replacing(folder: Path) -> Iterator[None]:
    """Inside, a run goes on in ``folder``. Where it ends well, the one before is deleted; or else see above."""
    try:
        yield
    except BaseException:
        bring_back(folder)
        raise
    if (folder / SUMMARY).is_file():
        rank_zero_only(shutil.rmtree)(folder / FORMER, ignore_errors=True)


def _move(source: Path, target: Path) -> None:
    for name in OWN:
        if (source / name).exists():
            (source / name).rename(target / name)


def _remove(folder: Path) -> None:
    for name in OWN:
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
        else:
            (folder / name).unlink(missing_ok=True)
