"""Signals that are noted, and the handlers that come back afterwards."""

from __future__ import annotations

import os
import pickle
import signal
import threading

import pytest

from qtrain.utils.signals import SignalNote, handling


def note_of_three() -> SignalNote:
    return SignalNote((signal.SIGINT, signal.SIGTERM, signal.SIGUSR1), what="stopping soon")


def test_note_keeps_the_signal_and_the_second_ctrl_c_interrupts() -> None:
    note, before = note_of_three(), signal.getsignal(signal.SIGINT)
    note.install()
    try:
        os.kill(os.getpid(), signal.SIGINT)
        assert note.signum == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        note.restore()
    assert signal.getsignal(signal.SIGINT) is before


def test_of_several_signals_the_last_in_the_list_counts() -> None:
    note = note_of_three()
    note.install()
    try:
        for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
            os.kill(os.getpid(), signum)
        assert note.signum == signal.SIGUSR1
    finally:
        note.restore()


def test_a_forked_process_ignores_noted_signals_and_ends_on_sigterm() -> None:
    note = note_of_three()
    note.install()
    try:
        pid = os.fork()
        if pid == 0:
            for signum in (signal.SIGINT, signal.SIGUSR1):
                os.kill(os.getpid(), signum)  # passed over
            os.kill(os.getpid(), signal.SIGTERM)  # ends it
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM
    finally:
        note.restore()
    assert note.signum is None


def test_a_closed_note_hands_signals_on_and_keeps_the_first() -> None:
    late: list[signal.Signals] = []
    with note_of_three() as note:
        os.kill(os.getpid(), signal.SIGTERM)
        note.close(late.append)
        for signum in (signal.SIGUSR1, signal.SIGTERM):
            os.kill(os.getpid(), signum)
    assert (note.signum, late) == (signal.SIGTERM, [signal.SIGUSR1, signal.SIGTERM])


def test_a_note_in_use_is_pickled_without_its_handlers() -> None:
    """Ray writes down a sweep's stopper, which holds one, every few minutes."""
    with note_of_three() as note:
        os.kill(os.getpid(), signal.SIGTERM)
        assert pickle.loads(pickle.dumps(note)).signum == signal.SIGTERM


def test_outside_the_main_thread_handlers_stay_as_they_are() -> None:
    before, inside = signal.getsignal(signal.SIGUSR1), []

    def work() -> None:
        with handling((signal.SIGUSR1,), lambda signum: None):
            inside.append(signal.getsignal(signal.SIGUSR1))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert inside == [before]
