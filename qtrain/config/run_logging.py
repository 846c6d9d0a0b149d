"""Where a run's log goes: short lines to the terminal, full ones to a file in the run's folder."""

import logging
import os
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path
from typing import final

from hydra.core.utils import configure_log
from omegaconf import DictConfig, open_dict, read_write

from qtrain.settings.run_files import CONFIG, HOLDER, LOCK
from qtrain.utils.errors import ConfigError

RUN_LOG = f"{__name__}.RunLog"
"""The class of the handler in ``conf/hydra/job_logging``."""

OF_NO_RUN = (CONFIG, LOCK, HOLDER)
"""Files beside the log in the folder of a run that was refused before it began."""

_REMEDY = "give output=FOLDER, another place for runs"


@final
class RunLog(logging.FileHandler):
    """The log file of the run that is going on; its folder is made with the first line, and nothing is kept outside of
    a run.

    If the file cannot be written, for instance on a full disk, a line on stderr says so once, and the run goes on.
    """

    def __init__(self, filename: str) -> None:
        super().__init__(os.devnull, delay=True, encoding="utf-8")
        self.name_in_folder = Path(filename).name
        self._told = False

    def _open(self) -> TextIOWrapper:
        Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
        return super()._open()

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._told:
            self._told = True
            print(f"qtrain: {self.baseFilename} cannot be written: {error.strerror}", file=sys.stderr)

    def move(self, file: str) -> None:
        """Let the next line go to ``file``."""
        self.close()
        self.baseFilename = os.path.abspath(file)


def start_logging(cfg: DictConfig) -> None:
    """Set logging up as ``conf/hydra/job_logging`` says, for the run of the composed ``cfg``."""
    with read_write(cfg.hydra.runtime), open_dict(cfg.hydra.runtime):
        cfg.hydra.runtime.output_dir = str(Path(cfg.hydra.run.dir).absolute())
    configure_log(cfg.hydra.job_logging, cfg.hydra.verbose)


@contextmanager
def logged_in(folder: Path) -> Iterator[None]:
    """Let the log of this block go to a file in ``folder``.

    If the block is refused by a ``ValueError`` before a run began there, the folder is not left behind. Raises
    ``ConfigError`` where no such folder can be made.
    """
    made = _make(folder)
    handlers = [handler for handler in logging.getLogger().handlers if isinstance(handler, RunLog)]
    before = [handler.baseFilename for handler in handlers]
    for handler in handlers:
        handler.move(str(folder / handler.name_in_folder))
    refused = False
    try:
        yield
    except ValueError:
        refused = True
        raise
    finally:
        for handler, file in zip(handlers, before, strict=True):
            handler.move(file)
        if refused:
            _remove(folder, made, [*OF_NO_RUN, *(handler.name_in_folder for handler in handlers)])


def _make(folder: Path) -> list[Path]:
    """``folder`` and those above it that do not exist, from below; the topmost is made, and stays.

    Other ranks may write there from now on, so nothing is taken back just to see whether it could be made. Raises
    ``ConfigError`` where it cannot.
    """
    absent: list[Path] = []
    try:
        for place in (folder.absolute(), *folder.absolute().parents):
            try:
                mode = place.stat().st_mode  # once: another rank may make it between two looks
            except (FileNotFoundError, NotADirectoryError):
                absent.append(place)
                continue
            if not stat.S_ISDIR(mode):
                raise ConfigError(f"output: {place} is a file, not a folder; {_REMEDY}")
            if not os.access(place, os.W_OK | os.X_OK):
                raise ConfigError(f"output: {place} cannot be written to; {_REMEDY}")
            break
        if absent:
            place = absent[-1]
            place.mkdir(exist_ok=True)  # another rank may be a moment ahead
    except OSError as error:
        raise ConfigError(f"output: cannot make {place} ({error.strerror}); {_REMEDY}") from error
    return absent


def _remove(folder: Path, made: list[Path], trivial: list[str]) -> None:
    """Remove ``folder``, and those of ``made`` above it, if nothing but files named ``trivial`` is in it.

    Not while another process, which came first, holds it: the file that says so is empty where none does.
    """
    with suppress(OSError):
        if made and not _is_held(folder) and all(path.name in trivial for path in folder.iterdir()):
            shutil.rmtree(folder)
    for place in made:
        with suppress(OSError):  # it is gone, or something else is in it
            place.rmdir()


def _is_held(folder: Path) -> bool:
    holder = folder / HOLDER
    return holder.is_file() and holder.stat().st_size > 0
