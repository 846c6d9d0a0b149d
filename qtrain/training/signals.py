"""Ctrl-C, SIGTERM and SIGUSR1 as a wish that is granted at the next good moment.

Saving inside a signal handler deadlocks when ranks are at different batches, and loader workers that were
forked run the handler too. So the handler only notes the signal, and only in the process that installed it.

SIGTERM and Ctrl-C ask a run to stop, SIGUSR1 asks it to stop and to go on in a new start of its SLURM job: a batch
script has SLURM send it some minutes before the time limit.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, final

from qtrain.training.slurm import SlurmJob

log = logging.getLogger(__name__)

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Of several that come, the last of these counts: SLURM follows SIGUSR1 by SIGTERM where saving takes too long."""

LAST_WAIT_S = 600
"""How long a process whose job is requeued waits to be ended by SLURM, which takes ``KillWait`` (30 s) at the most."""


_asked_to_end = threading.Event()


def wait_for_the_end() -> None:
    """Stay until SLURM, which was asked to requeue this job, ends this process, unless it has tried already.

    A rank that left of its own would have ``srun --kill-on-bad-exit`` kill the others, in the middle of closing their
    loggers; and a multirun's parent would take the exit for the job's result.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if _asked_to_end.is_set():
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(LAST_WAIT_S)


@contextmanager
def requeue_outside_of_training() -> Iterator[None]:
    """Within a SLURM job: SIGUSR1 requeues it, where nothing else has the signal.

    A fit takes the signal over. Before, between and after fits there is nothing to save that is not kept already.
    Without this SIGUSR1, whose default is to kill, would end the job for good.
    """
    job = SlurmJob.current()
    if job is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    pid = os.getpid()

    def handle(signum: int, frame: FrameType | None) -> None:
        if os.getpid() != pid:
            return
        log.warning("SIGUSR1 outside of training: nothing to save, %s starts again", job)
        # The other ranks have the signal too, and wait for what the first one asks for.
        if os.environ.get("SLURM_PROCID", "0") != "0" or job.requeue():
            wait_for_the_end()
        raise SystemExit(128 + signum)

    before = signal.signal(signal.SIGUSR1, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before if before is not None else signal.SIG_DFL)


@final
class SignalNote:
    """Remembers which of the handled signals came, until ``restore()``.

    The second Ctrl-C does what the first would have done without this: it interrupts at once.
    """

    def __init__(self) -> None:
        self.signum: signal.Signals | None = None
        self._previous: dict[int, Any] = {}
        self._pid = -1
        self._closing = False

    def install(self) -> None:
        """Take over these signals; without effect outside the main thread, where Python allows no handlers."""
        if self._previous or threading.current_thread() is not threading.main_thread():
            return
        self._pid = os.getpid()
        for signum in HANDLED:
            self._previous[signum] = signal.signal(signum, self._handle)

    def close(self) -> None:
        """The run has heard: from now on SIGTERM and SIGUSR1 change nothing, and the process cleans up until it ends.

        SLURM sends SIGTERM while it ends a job that was requeued.
        """
        self._closing = True

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        for signum, handler in self._previous.items():
            signal.signal(signum, handler if handler is not None else signal.SIG_DFL)
        self._previous = {}

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            # Some forked process: the main process stops it in good order; SIGTERM ends it as ever.
            if signum == signal.SIGTERM:
                signal.signal(signum, signal.SIG_DFL)
                os.kill(os.getpid(), signum)
            return
        if self.signum is not None and signum == signal.SIGINT:
            self.restore()
            raise KeyboardInterrupt
        if self._closing:
            if signum == signal.SIGTERM:
                _asked_to_end.set()
            return
        if self.signum is None or HANDLED.index(signum) > HANDLED.index(self.signum):
            self.signum = signal.Signals(signum)
        log.warning(
            "%s: stopping after this batch (during validation: after it); Ctrl-C again stops at once",
            signal.Signals(signum).name,
        )
