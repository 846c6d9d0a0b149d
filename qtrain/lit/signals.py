"""Ctrl-C and SIGTERM as a wish that is granted at the next good moment.

Floor 5. Saving inside a signal handler deadlocks when ranks are at different batches, and loader workers that were
forked run the handler too. So the handler only notes the signal, and only in the process that installed it.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any, final

log = logging.getLogger(__name__)

HANDLED = (signal.SIGINT, signal.SIGTERM)


class RunInterruptedError(Exception):
    """The run was asked to stop, saved itself and stopped. ``exit_code`` follows the shell: 128 + signal number."""

    def __init__(self, *, signum: int, resume_point: Path | None) -> None:
        self.signum = signum
        self.resume_point = resume_point
        self.exit_code = 128 + signum
        saved = f"saved {resume_point}" if resume_point else "nothing was saved yet"
        super().__init__(f"stopped by {signal.Signals(signum).name}; {saved}")


@final
class SignalNote:
    """Remembers the first SIGINT or SIGTERM between ``install()`` and ``restore()``.

    The second Ctrl-C does what the first would have done without this: it interrupts at once.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._previous: dict[int, Any] = {}
        self._pid = -1

    def install(self) -> None:
        """Take over both signals; without effect outside the main thread, where Python allows no handlers."""
        if self._previous or threading.current_thread() is not threading.main_thread():
            return
        self._pid = os.getpid()
        for signum in HANDLED:
            self._previous[signum] = signal.signal(signum, self._handle)

    def restore(self) -> None:
        """Give both signals back to whoever had them."""
        for signum, handler in self._previous.items():
            signal.signal(signum, handler if handler is not None else signal.SIG_DFL)
        self._previous = {}

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            # A forked loader worker: on Ctrl-C the main process stops it in good order; SIGTERM ends it as ever.
            if signum == signal.SIGTERM:
                signal.signal(signum, signal.SIG_DFL)
                os.kill(os.getpid(), signum)
            return
        if self.signum is not None and signum == signal.SIGINT:
            self.restore()
            raise KeyboardInterrupt
        self.signum = signum
        log.warning(
            "%s: stopping after this batch (during validation: after it); Ctrl-C again stops at once",
            signal.Signals(signum).name,
        )
