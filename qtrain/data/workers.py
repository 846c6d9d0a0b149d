"""How a loader's worker process takes signals."""

from __future__ import annotations

import os
import signal
import threading


def outlive_sigterm(worker: int) -> None:
    """A DataLoader's ``worker_init_fn``: SIGTERM ends the worker if its owner sends it, and only then.

    A scheduler that wants a job's place sends SIGTERM to every process of it. The main process then finishes its batch
    and saves, for which it needs its workers. torch's own handler would end them, and raise in the main process.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_obey, args=(os.getppid(),), name="sigterm", daemon=True).start()


def _obey(owner: int) -> None:
    # A handler does not learn who sent a signal; ``sigwaitinfo`` does.
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != owner:
        pass
    os._exit(0)
