"""Where metrics go: a file of ours that loses no row, and W&B where it is wanted.

Floor 5, and the only file that knows ``wandb`` while training. W&B keeps its last rows in memory, so a killed run
lacks them; ``metrics.jsonl`` is the record, and reports read only that.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import netrc
import os
import socket
import time
import uuid
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, final
from urllib.parse import urlsplit

from pytorch_lightning.loggers import Logger, WandbLogger

log = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")
WALL_CLOCK_FIELDS = ("time", "images_per_s")
"""Fields of a row that differ between two otherwise identical runs."""


def split_metrics(metrics: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """``{"val/top1": 90.0}`` to ``{"val": {"top1": 90.0}}``; names without a known split count as train."""
    rows: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        split, _, rest = name.partition("/")
        split, rest = (split, rest) if split in SPLITS and rest else ("train", name)
        rows.setdefault(split, {})[rest] = value
    return rows


@final
class JsonlLogger(Logger):
    """Appends rows to ``folder/metrics.jsonl``, each flushed at once.

    A row is ``{"step", "epoch", "time", "split", name: number, ...}``: optimizer steps done, epoch, seconds since
    1970, train or val or test. Numbers that are not finite become ``null``, as JSON has no others.

    ``position()`` and ``rewind(position)`` let a checkpoint remember how long the file was: rows that a killed run
    wrote after its last save are written again by the run that resumes, and must not be there twice.
    """

    def __init__(self, *, folder: str | Path) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.jsonl"
        self._file: IO[bytes] | None = None

    @property
    def name(self) -> str:
        return "jsonl"

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: the configuration lies beside the metrics, in a file of its own."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """One row for each split that occurs in ``metrics``; its ``epoch`` goes to every row."""
        metrics = dict(metrics)
        head = {"step": int(step or 0), "epoch": int(metrics.pop("epoch", 0)), "time": round(time.time(), 3)}
        file = self._open()
        for split, values in split_metrics(metrics).items():
            numbers = {name: float(value) if math.isfinite(value) else None for name, value in values.items()}
            file.write(json.dumps({**head, "split": split, **numbers}).encode() + b"\n")
        file.flush()

    def position(self) -> int:
        """Length of the file in bytes, all of which are on the disk when this returns."""
        file = self._open()
        file.flush()
        os.fsync(file.fileno())
        return self.path.stat().st_size

    def rewind(self, position: int) -> None:
        """Drop what was written after ``position``, half a line of a killed run included."""
        file = self._open()
        size = self.path.stat().st_size
        if size < position:
            log.warning("%s has %d bytes where the resume point knows %d: rows are missing", self.path, size, position)
            position = size
        content = self.path.read_bytes()[:position]
        # After damage from outside the cut may lie within a line: keep whole lines only.
        file.truncate(content.rfind(b"\n") + 1)
        file.flush()
        os.fsync(file.fileno())

    def finalize(self, status: str) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> IO[bytes]:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab")
        return self._file


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``; a last line that was cut off by a kill is left out."""
    lines = Path(path).read_bytes().split(b"\n")
    return [json.loads(line) for line in lines[:-1] if line]


def wandb_mode(*, mode: str, host_timeout_s: float) -> tuple[str, str]:
    """What W&B can do here, and why: (``online`` | ``offline`` | ``disabled``, reason).

    Online needs a key (``WANDB_API_KEY`` or ``~/.netrc``) and a host that accepts a connection within
    ``host_timeout_s`` seconds; the client's own attempt would hold a run without a network for 100 seconds.
    """
    if importlib.util.find_spec("wandb") is None:
        return "disabled", "wandb is not installed (pip install 'qtrain[wandb]')"
    if mode != "online":
        return mode, f"logger.wandb.mode={mode}"
    url = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    host, port = url.hostname or "api.wandb.ai", url.port or (80 if url.scheme == "http" else 443)
    if os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        return os.environ["WANDB_MODE"], f"WANDB_MODE={os.environ['WANDB_MODE']}"
    if not _has_key(host):
        return "offline", f"no key for {host} (set WANDB_API_KEY or run `wandb login`)"
    try:
        socket.create_connection((host, port), timeout=host_timeout_s).close()
    except OSError as error:
        return "offline", f"{host}:{port} is not reachable ({error})"
    return "online", f"{host} is reachable"


def make_wandb_logger(
    *,
    folder: str | Path,
    config: Mapping[str, Any] | None = None,
    project: str = "qtrain",
    entity: str | None = None,
    group: str | None = None,
    name: str | None = None,
    tags: Sequence[str] = (),
    mode: str = "online",
    host_timeout_s: float = 3.0,
    init_timeout_s: float = 15.0,
    finish_timeout_s: float = 60.0,
) -> WandbLogger | None:
    """Lightning's W&B logger for the run in ``folder``, or ``None`` where wandb is missing or disabled.

    ``config`` is the run's configuration as plain data, for W&B's tables. ``online`` falls back to ``offline`` without
    key or network, and one log line says so and how to upload. A run that resumes in the same folder continues the
    same W&B run.
    """
    if mode not in ("online", "offline", "disabled"):
        raise ValueError(f"make_wandb_logger: mode must be online, offline or disabled, got {mode!r}")
    possible, reason = wandb_mode(mode=mode, host_timeout_s=host_timeout_s)
    if possible == "disabled":
        log.info("W&B is off: %s", reason)
        return None
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if possible == "offline":
        log.info("W&B is offline: %s; upload later with `wandb sync %s/wandb/offline-run-*`", reason, folder)
    # Artifacts of offline runs are staged here until they are synced.
    os.environ.setdefault("WANDB_DATA_DIR", str(folder / "wandb"))
    import wandb

    settings = wandb.Settings(
        init_timeout=init_timeout_s, finish_timeout=finish_timeout_s, silent=True, disable_git=True, console="off"
    )
    return WandbLogger(
        save_dir=str(folder),
        project=project,
        entity=entity,
        group=group,
        name=name,
        tags=list(tags),
        id=_run_id(folder),
        config=dict(config or {}),
        resume="allow",
        offline=possible == "offline",
        settings=settings,
    )


def close(loggers: Sequence[Logger | None], *, failed: bool = False) -> None:
    """End the loggers: files closed, the W&B run finished (which, unlike Lightning's finalize, flushes its rows)."""
    for logger in loggers:
        if logger is None:
            continue
        logger.finalize("failed" if failed else "success")
        if isinstance(logger, WandbLogger) and logger._experiment is not None:
            logger.experiment.finish(exit_code=int(failed))


def _has_key(host: str) -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _run_id(folder: Path) -> str:
    """The W&B run's id, made once for the run folder and kept there."""
    path = folder / "wandb_run_id.txt"
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:12] + "\n")
    return path.read_text().strip()
