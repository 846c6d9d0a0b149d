"""What a run asks of SLURM, with a ``scontrol`` that writes down what it was asked. The real one: tests/slurm."""

from __future__ import annotations

import logging
import os
import signal
import threading
from pathlib import Path
from unittest.mock import Mock

import pytest

from qtrain.training import signals
from qtrain.training.callbacks.signals import StopOnSignal
from qtrain.training.resume import ResumePoints
from qtrain.training.signals import requeue_outside_of_training
from qtrain.training.slurm import SlurmJob
from qtrain.utils.errors import RunInterruptedError

RUNNING = "JobId=12 JobState=RUNNING PreemptTime=%s Partition=low"


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of what ``scontrol`` was asked; what it answers is in the file ``answer`` beside it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "scontrol"
    script.write_text(
        f'#!/bin/sh\necho "$@" >> {folder}/asked\n[ "$1" = show ] && cat {folder}/answer 2>/dev/null\nexit 0\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    return folder / "asked"


def test_slurm_job_number_and_restarts_come_from_the_environment() -> None:
    assert SlurmJob.current({}) is None
    assert str(SlurmJob.current({"SLURM_JOB_ID": "12"})) == "SLURM job 12"
    again = SlurmJob.current({"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "2"})
    assert again == SlurmJob("12", restarts=2) and str(again) == "SLURM job 12, restarted 2 times"
    # The last task of an array, whose number is the array's: requeued by that, all tasks would start again.
    task = {"SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3", "SLURM_RESTART_COUNT": "1"}
    assert str(SlurmJob.current(task)) == "SLURM job 12_3, restarted once"


@pytest.mark.parametrize(
    ("answer", "preempted"),
    [
        (RUNNING % "2026-11-21T19:15:06", True),
        (RUNNING % "None", False),
        ("JobId=12 JobState=CANCELLED PreemptTime=2026-11-21T19:15:06", False),
        ("JobId=12 JobState=RUNNING Partition=low", False),
    ],
)
def test_preempted_is_true_only_for_a_preemption(asked: Path, answer: str, preempted: bool) -> None:
    (asked.parent / "answer").write_text(answer)
    assert SlurmJob("12").preempted() is preempted


def test_a_job_that_cannot_be_requeued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not SlurmJob("12").requeue() and not SlurmJob("12").preempted()
    assert "SLURM job 12 cannot be requeued (" in caplog.text


@pytest.mark.parametrize(
    ("signum", "answer", "requeued"),
    [
        (signal.SIGUSR1, "", True),
        (signal.SIGUSR1, "JobId=12 JobState=CANCELLED", False),
        (signal.SIGTERM, RUNNING % "2026-11-21T19:15:06", True),
        (signal.SIGTERM, RUNNING % "None", False),
        (signal.SIGINT, RUNNING % "2026-11-21T19:15:06", False),
    ],
)
def test_which_signals_requeue(asked: Path, signum: int, answer: str, requeued: bool) -> None:
    (asked.parent / "answer").write_text(answer)
    stop = StopOnSignal(resume_points=ResumePoints(folder=asked.parent))
    assert stop._requeued(signum) == (SlurmJob("12") if requeued else None)
    said = asked.read_text().splitlines() if asked.exists() else []
    assert ("requeue 12" in said) is requeued


@pytest.mark.parametrize("rank", [0, 1])
def test_first_rank_alone_requeues_and_all_ranks_know_of_it(asked: Path, rank: int) -> None:
    trainer = Mock(is_global_zero=rank == 0)
    trainer.strategy.broadcast.side_effect = lambda own: own if rank == 0 else SlurmJob("12")
    stop = StopOnSignal(resume_points=ResumePoints(folder=asked.parent))
    with pytest.raises(RunInterruptedError) as stopped:
        stop._stop(trainer, signal.SIGUSR1)
    assert stopped.value.requeued_job == "12"
    said = asked.read_text().splitlines() if asked.exists() else []
    assert said.count("requeue 12") == (1 if rank == 0 else 0)


@pytest.mark.parametrize("requeued", [True, False])
def test_signals_after_the_stop_change_nothing_and_sigterm_is_remembered(
    asked: Path, requeued: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """SLURM sends SIGTERM to a job that it requeues while the process cleans up; without a job handlers come back."""
    ended = threading.Event()
    monkeypatch.setattr(signals, "_asked_to_end", ended)
    if not requeued:
        monkeypatch.delenv("SLURM_JOB_ID")
    trainer = Mock(is_global_zero=True)
    trainer.strategy.broadcast.side_effect = lambda own: own
    before = signal.getsignal(signal.SIGTERM)
    stop = StopOnSignal(resume_points=ResumePoints(folder=asked.parent))
    stop.note.install()
    try:
        with pytest.raises(RunInterruptedError) as stopped:
            stop._stop(trainer, signal.SIGINT if not requeued else signal.SIGUSR1)
        caplog.clear()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert not ended.is_set()
        os.kill(os.getpid(), signal.SIGTERM)
        assert ended.is_set()
        assert stop.note.signum is None and caplog.messages == []
        stop.on_exception(trainer, Mock(), stopped.value)
        assert (signal.getsignal(signal.SIGTERM) is before) is not requeued
    finally:
        stop.note.restore()


def test_wait_for_the_end_ends_the_process_that_slurm_has_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """And else it waits for SLURM, with the default handler, for which SIGTERM is the end."""
    did: list[object] = []
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    monkeypatch.setattr(signals, "_asked_to_end", threading.Event())
    monkeypatch.setattr(signals.os, "kill", lambda pid, signum: did.append((pid, signum)))
    monkeypatch.setattr(signals.time, "sleep", lambda seconds: did.append(signal.getsignal(signal.SIGTERM)))
    try:
        signals.wait_for_the_end()
        assert did == [signal.SIG_DFL]
        signals._asked_to_end.set()
        signals.wait_for_the_end()
        assert did[1:] == [(os.getpid(), signal.SIGTERM), signal.SIG_DFL]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_sigusr1_outside_of_training_requeues_the_job(
    asked: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    waited: list[bool] = []
    monkeypatch.setattr(signals, "wait_for_the_end", lambda: waited.append(True))
    before = signal.getsignal(signal.SIGUSR1)
    for rank in ("0", "1"):
        monkeypatch.setenv("SLURM_PROCID", rank)
        with pytest.raises(SystemExit) as ended, caplog.at_level(logging.WARNING), requeue_outside_of_training():
            os.kill(os.getpid(), signal.SIGUSR1)
        assert ended.value.code == 138
        assert signal.getsignal(signal.SIGUSR1) is before
    said = asked.read_text().splitlines()
    assert said.count("requeue 12") == 1 and waited == [True, True]  # by the first rank alone
    assert "nothing to save, SLURM job 12 starts again" in caplog.text


def test_sigusr1_keeps_its_handler_without_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    before = signal.getsignal(signal.SIGUSR1)
    with requeue_outside_of_training():
        assert signal.getsignal(signal.SIGUSR1) is before
