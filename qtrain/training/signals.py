"""What a training does on Ctrl-C, SIGTERM and SIGUSR1.

SIGTERM and Ctrl-C ask a run to stop. SIGUSR1 asks it to stop and to continue in a new start of its SLURM job: a batch
script has SLURM send it some minutes before the time limit. A fit notes the signal (:class:`SignalNote`) and saves at
the end of the batch. Saving in the handler would deadlock where ranks are at different batches.
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from qtrain.training.slurm import SlurmJob
from qtrain.utils.signals import SignalNote, handling

log = logging.getLogger(__name__)

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Of several that come, the last of these counts: SLURM follows SIGUSR1 by SIGTERM where saving takes too long."""

LAST_WAIT_S = 600
"""How long a process whose job is requeued waits for SLURM to end it, which takes at most ``KillWait`` (30 s)."""

_asked_to_end = threading.Event()


def training_note() -> SignalNote:
    """The note of a fit, which looks at it after each batch."""
    return SignalNote(HANDLED, what="stopping after this batch (during validation: after it)")


def close_note(note: SignalNote) -> None:
    """From now on SIGTERM and SIGUSR1 change nothing: the run has stopped, and the process cleans up until it ends.

    SLURM sends SIGTERM while it ends a job that was requeued; :func:`wait_for_the_end` needs to know that it came.
    """
    note.close(_remember_sigterm)


def _remember_sigterm(signum: signal.Signals) -> None:
    if signum == signal.SIGTERM:
        _asked_to_end.set()


def wait_for_the_end() -> None:
    """Wait until SLURM, which was asked to requeue this job, ends this process; at once if it has tried already.

    If a rank left by itself, ``srun --kill-on-bad-exit`` would kill the others while they close their loggers, and the
    parent process of a multirun would take the exit for the job's result.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if _asked_to_end.is_set():
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(LAST_WAIT_S)


@contextmanager
def requeue_outside_of_training() -> Iterator[None]:
    """Inside, SIGUSR1 requeues the SLURM job of this process, unless a fit has taken the signal over.

    Before, between and after fits everything is saved already. Without this handler SIGUSR1, whose default is to kill,
    would end the job for good. Without effect outside of SLURM.
    """
    job = SlurmJob.current()
    if job is None:
        yield
        return

    def requeue(signum: signal.Signals) -> None:
        log.warning("SIGUSR1 outside of training: nothing to save, %s starts again", job)
        # The other ranks get the signal too, and wait until SLURM does what the first rank asked for.
        if os.environ.get("SLURM_PROCID", "0") != "0" or job.requeue():
            wait_for_the_end()
        raise SystemExit(128 + signum)

    with handling((signal.SIGUSR1,), requeue):
        yield
