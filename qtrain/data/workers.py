"""How a loader's worker process takes signals. Floor 3."""

from __future__ import annotations

import signal
from types import FrameType


def outlive_sigterm(worker: int) -> None:
    """A DataLoader's ``worker_init_fn``: the first SIGTERM is passed over, the second ends the worker.

    A scheduler that wants a job's place sends SIGTERM to every process of it. The main process then finishes its batch
    and saves, for which it needs its workers; torch's own handler ends them, and raises in the main process.
    """

    def pass_over(signum: int, frame: FrameType | None) -> None:
        signal.signal(signum, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, pass_over)
