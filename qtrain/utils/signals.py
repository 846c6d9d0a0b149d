"""Signals as wishes: noted when they come, granted at the next good moment.

A handler runs between any two instructions. There it must not save, log to a server or talk to other processes. Python
allows handlers only in the main thread; a forked process inherits them, although the signal was not meant for it.
"""

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any, Self, final

log = logging.getLogger(__name__)


@contextmanager
def handling(signums: Sequence[signal.Signals], handle: Callable[[signal.Signals], None]) -> Iterator[None]:
    """Inside, ``handle`` is called for each of ``signums``; afterwards these have their previous handlers again.

    Without effect outside the main thread. In a process that is forked inside, SIGTERM ends that process and the other
    signals are ignored: the process that forked it stops it in good order.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def handler(signum: int, frame: FrameType | None) -> None:
        if os.getpid() == owner:
            handle(signal.Signals(signum))
        elif signum == signal.SIGTERM:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)

    before = {signum: signal.signal(signum, handler) for signum in signums}
    try:
        yield
    finally:
        for signum, previous in before.items():
            signal.signal(signum, previous if previous is not None else signal.SIG_DFL)


@final
class SignalNote:
    """Remembers in ``signum`` which of ``handled`` came, between :meth:`install` and :meth:`restore` or in a ``with``.

    Of several that come, the one that stands last in ``handled`` counts. Each logs ``what``, the answer to it. The
    second Ctrl-C interrupts at once, by ``KeyboardInterrupt``.
    """

    def __init__(self, handled: Sequence[signal.Signals], *, what: str) -> None:
        self.handled = tuple(handled)
        self.what = what
        self.signum: signal.Signals | None = None
        self._late: Callable[[signal.Signals], None] | None = None
        self._installed: ExitStack | None = None

    def __enter__(self) -> Self:
        self.install()
        return self

    def __exit__(self, *error: object) -> None:
        self.restore()

    def __getstate__(self) -> dict[str, Any]:
        """Without the handlers, which belong to this process."""
        return {**vars(self), "_installed": None}

    def install(self) -> None:
        """Take over the signals, if that has not been done; see :func:`handling` for where it has no effect."""
        if self._installed is None:
            self._installed = ExitStack()
            self._installed.enter_context(handling(self.handled, self._note))

    def close(self, late: Callable[[signal.Signals], None]) -> None:
        """From now on a signal only calls ``late``: the process has stopped its work and is cleaning up."""
        self._late = late

    def restore(self) -> None:
        """Give the signals back to their previous handlers."""
        if self._installed is not None:
            installed, self._installed = self._installed, None
            installed.close()

    def _note(self, signum: signal.Signals) -> None:
        if self.signum is not None and signum == signal.SIGINT:
            self.restore()
            raise KeyboardInterrupt
        if self._late is not None:
            self._late(signum)
            return
        if self.signum is None or self.handled.index(signum) > self.handled.index(self.signum):
            self.signum = signum
        log.warning("%s: %s; Ctrl-C again stops at once", signum.name, self.what)
