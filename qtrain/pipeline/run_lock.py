"""One run in a folder at a time, whatever machine it is on.

Two jobs that write to one folder destroy each other's resume points. So the first process of a run holds a lock on the
file ``.lock`` in its folder. The kernel releases it when the process ends, however it ends, so on one machine, and on
file systems that carry ``flock`` between machines (NFS, GPFS, CephFS; Lustre if mounted with ``flock``), a lock that is
free belongs to nobody. Elsewhere a lock that looks free may be held on another machine: there the holder's heartbeat in
the file ``.holder`` tells a live holder from a dead one. It is a number that grows, so no clocks are compared.
"""

import errno
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import final

from filelock import BaseFileLock, FileLock, Timeout
from pytorch_lightning.utilities import rank_zero_only

from qtrain.settings.run_files import HOLDER, LOCK
from qtrain.training.ranks import first_rank_first
from qtrain.training.slurm import SlurmJob
from qtrain.utils.errors import ConfigError

log = logging.getLogger(__name__)

BEAT_S = 15.0
"""Seconds between two beats of a holder."""

MISSED_BEATS = 4
"""So many beats without a sign, and a holder on another machine counts as dead."""


@final
@dataclass(frozen=True)
class Holder:
    """Who has a folder: written by the holder itself. ``launch`` is common to all ranks of one start of a job."""

    host: str
    pid: int
    job: str
    launch: str
    since: str
    token: str
    beat: int = 0

    @classmethod
    def me(cls) -> "Holder":
        job = SlurmJob.current()
        return cls(
            host=socket.gethostname(),
            pid=os.getpid(),
            job=job.number if job else "",
            launch=_launch(),
            since=datetime.now().astimezone().isoformat(timespec="seconds"),
            token=uuid.uuid4().hex,
        )

    def __str__(self) -> str:
        job = f"SLURM job {self.job}, " if self.job else ""
        return f"{job}process {self.pid} on {self.host}, since {self.since}"


@contextmanager
def only_run_in(folder: Path, *, wait_until: Callable[[], bool] | None = None) -> Iterator[None]:
    """Hold ``folder`` for this run. Raises ``ConfigError`` where another run that lives has it.

    With ``wait_until``, wait for the other run instead, or until the condition holds.

    The first rank holds the lock. The others write nothing before they have met it in a fit, so where it is refused
    they just end with it; where it waits, they wait until it has the lock, or until the condition holds.
    """
    path = folder / HOLDER
    if getattr(rank_zero_only, "rank", 0) != 0:
        if wait_until is not None:
            first_rank_first(lambda: wait_until() or _is_of_this_launch(_read(path)), what=f"the lock on {folder}")
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    # Forked loader workers, which may outlive this process for some seconds, do not inherit the lock.
    lock = FileLock(folder / LOCK, blocking=False, fallback_to_soft=False)
    try:
        if _take(lock, path, wait_until):
            with _heart(path):
                yield
        else:
            yield
    finally:
        lock.release()


def _take(lock: BaseFileLock, path: Path, wait_until: Callable[[], bool] | None) -> bool:
    """Whether the lock is this process's now; ``False`` if ``wait_until`` came true."""
    told = False
    while True:
        if _is_free(lock, path):
            return True
        if wait_until is None:
            raise ConfigError(
                f"run_dir: {path.parent} is in use by {_read(path) or 'another run'}; wait for its end, or choose "
                "another name=... or output=..."
            )
        if wait_until():
            return False
        if not told:
            log.info("%s is in use by %s; waiting for it", path.parent, _read(path) or "another run")
            told = True
        time.sleep(1.0)


def _is_free(lock: BaseFileLock, path: Path) -> bool:
    """Lock the file if no live run has it."""
    try:
        lock.acquire()
    except Timeout:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
        log.warning("the file system of %s has no locks (%s); trusting heartbeats alone", path.parent, error)
    former = _read(path)
    if former is None:
        return True
    me = Holder.me()
    # SLURM has ended the start before this one; flock spoke for a process of this machine.
    ended = former.host == me.host or (former.job and former.job == me.job)
    if not ended and _lives(path, former):
        lock.release()
        return False
    log.info("%s: taken over from %s, which has ended without a word", path.parent, former)
    return True


def _lives(path: Path, former: Holder) -> bool:
    """Watch a holder on another machine: ``True`` with its next beat, ``False`` when it has missed several."""
    log.info("%s was left to %s; watching for %.0f s whether it lives", path.parent, former, MISSED_BEATS * BEAT_S)
    end = time.monotonic() + MISSED_BEATS * BEAT_S
    while time.monotonic() < end:
        time.sleep(BEAT_S / 5)
        now = _read(path)
        if now is None:
            return False
        if (now.token, now.beat) != (former.token, former.beat):
            return True
    return False


@contextmanager
def _heart(path: Path) -> Iterator[None]:
    """Write this holder into the file ``path`` again and again until the block ends; then empty it."""
    holder = Holder.me()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    _write(descriptor, holder)
    stop = threading.Event()

    def beat() -> None:
        nonlocal holder
        while not stop.wait(BEAT_S):
            now = _read(path)
            if now is not None and now.token != holder.token:
                # Only where locks do not reach other machines, and this one stood still for a while.
                log.critical("%s was taken over by %s while this run stood still; it ends here", path.parent, now)
                os._exit(1)
            holder = replace(holder, beat=holder.beat + 1)
            _write(descriptor, holder)

    thread = threading.Thread(target=beat, name=f"lock {path.parent.name}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        os.ftruncate(descriptor, 0)
        os.close(descriptor)


def _read(path: Path) -> Holder | None:
    """Who wrote the file last; ``None`` where nobody holds it. Opened anew, since NFS looks for news only then.

    For the same reason it is written in place: NFS may show a file that was replaced for a minute.
    """
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _write(descriptor: int, holder: Holder) -> None:
    content = json.dumps(asdict(holder)).encode() + b"\n"
    os.pwrite(descriptor, content, 0)
    os.ftruncate(descriptor, len(content))
    os.fsync(descriptor)


def _launch() -> str:
    """A name that the ranks of one start of a job have in common; empty where they are started by rank 0 itself."""
    env = os.environ
    if (job := SlurmJob.current()) is not None and "SLURM_STEP_ID" in env:
        return f"slurm-{job.number}-{job.restarts}-{env['SLURM_STEP_ID']}"
    if run := env.get("TORCHELASTIC_RUN_ID"):
        return f"torchrun-{run}-{env.get('MASTER_PORT')}-{env.get('TORCHELASTIC_RESTART_COUNT')}"
    if "RANK" in env and "MASTER_PORT" in env:  # each started by hand, or by a script
        return f"ranks-{env.get('MASTER_ADDR')}:{env['MASTER_PORT']}"
    return ""


def _is_of_this_launch(holder: Holder | None) -> bool:
    if holder is None:
        return False
    mine = _launch()
    # Lightning's own launcher starts the other ranks as children of the first.
    child = holder.pid == os.getppid() and holder.host == socket.gethostname()
    return bool(mine and holder.launch == mine) or child
