"""Checkpoint files that survive a power cut, contain no code, and whose damage is detected.

A file gets its name only when every byte of it is on the disk: it is written next to its destination, fsynced and
renamed, and the folder is fsynced. Files are read as plain data (``weights_only=True``), since unpickling objects could
run any code. Therefore a state with objects of other classes is already refused when saving.
"""

import contextlib
import logging
import os
import re
import zipfile
from pathlib import Path
from typing import Any, final

import torch
from pytorch_lightning.plugins.io import CheckpointIO
from torch.serialization import get_unsafe_globals_in_checkpoint

from qtrain.utils.atomic_write import atomic_write

log = logging.getLogger(__name__)

_NAME = re.compile(r"step[-=](\d+)\.ckpt")
"""With ``=`` in runs of earlier versions: a path with it cannot be given on the command line without quotes."""
IDENTITY = "qtrain_identity"
"""Key of a checkpoint: what the runs have in common of which one may go on from it."""

_REQUIRED = ("state_dict", "loops", "optimizer_states", "lr_schedulers", "global_step")


def resume_point_name(step: int) -> str:
    """File name of the resume point after ``step`` optimizer steps."""
    return f"step-{step:08d}.ckpt"


def list_resume_points(folder: str | Path) -> list[tuple[int, Path]]:
    """(step, file) of every resume point in ``folder``, oldest first, without unfinished temporary files."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    matches = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted((int(match.group(1)), path) for match, path in matches if match)


def write_atomically(state: dict[str, Any], path: str | Path) -> None:
    """``torch.save`` that replaces ``path`` as a whole: at every moment it has its old content or all of ``state``.

    Raises ``ValueError`` if ``state`` contains objects that ``weights_only=True`` would not read back.
    """
    path = Path(path)
    with atomic_write(path) as temporary:
        torch.save(state, temporary)
        if classes := get_unsafe_globals_in_checkpoint(temporary):
            raise ValueError(
                f"AtomicCheckpointIO: {path} may hold plain data only, but the state contains {sorted(classes)}; "
                "store numbers, strings, lists, dicts and tensors in state dicts and hyper-parameters"
            )


def read_checked(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """The content of a checkpoint file, after checking every byte.

    Raises ``FileNotFoundError`` if it does not exist, and ``ValueError`` with file and remedy if it is truncated,
    damaged (checksums differ), not a checkpoint, or contains pickled classes.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist; give the path of a .ckpt file")
    remedy = "delete it (the resume point before it is used then), or start over with resume=false"
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError) as error:
        raise ValueError(f"checkpoint {path} is truncated or not a checkpoint ({error}); {remedy}") from error
    if damaged is not None:
        raise ValueError(f"checkpoint {path} is damaged in {damaged!r} (wrong checksum); {remedy}")
    try:
        state = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # torch raises different errors, depending on which byte is missing
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"checkpoint {path} cannot be read as plain data ({reason}); it is foreign or holds pickled classes, "
            f"which are never executed; {remedy}"
        ) from error
    if not isinstance(state, dict):
        raise ValueError(f"checkpoint {path} holds a {type(state).__name__}, not a training state; {remedy}")
    return state


def find_resume_point(folder: str | Path) -> Path | None:
    """The newest file in ``folder`` from which a run can resume, or ``None``; damaged ones are logged and skipped."""
    for _, path in reversed(list_resume_points(folder)):
        try:
            state = read_checked(path)
        except ValueError as error:
            log.warning("%s -- trying the resume point before it", error)
            continue
        if missing := [key for key in _REQUIRED if key not in state]:
            log.warning("checkpoint %s lacks %s, so nothing can resume from it -- trying the one before", path, missing)
            continue
        return path
    return None


@final
class AtomicCheckpointIO(CheckpointIO):
    """Lightning's access to checkpoint files; pass it as ``Trainer(plugins=[AtomicCheckpointIO()])``.

    With an ``identity`` a checkpoint of another one is refused before anything of it is loaded.
    """

    def __init__(self, *, identity: str | None = None) -> None:
        self.identity = identity

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        if storage_options is not None:
            raise ValueError("AtomicCheckpointIO: storage_options are not supported; pass None")
        write_atomically(checkpoint, path)

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        if weights_only is False:
            raise ValueError(f"AtomicCheckpointIO: {path} is only ever read with weights_only=True")
        checkpoint = read_checked(path, map_location="cpu" if map_location is None else map_location)
        found = checkpoint.get(IDENTITY)
        if self.identity is not None and found != self.identity:
            raise ValueError(
                f"the checkpoint in {Path(path).parent} belongs to a run with another configuration ({found!r}, this "
                f"one is {self.identity!r}); restore it, take another folder, or start over with resume=false"
            )
        return checkpoint

    def remove_checkpoint(self, path: str | Path) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def remove_unfinished(folder: str | Path) -> None:
    """Delete unfinished temporary files of writes that were killed."""
    for path in Path(folder).glob(".step[-=]*.ckpt.*.tmp"):
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
