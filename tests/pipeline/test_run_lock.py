"""One run in a folder at a time: live holders keep it, dead ones lose it, on this machine and on others."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from pytorch_lightning.utilities import rank_zero_only

from qtrain.pipeline import run_lock
from qtrain.pipeline.run_lock import Holder, only_run_in
from qtrain.settings.run_files import HOLDER
from qtrain.utils.errors import ConfigError

HOLD = """
import os, sys, time
from pathlib import Path
from qtrain.pipeline.run_lock import only_run_in
with only_run_in(Path(sys.argv[1])):
    if os.fork() == 0:  # as a loader worker, which lives on for some seconds if its owner is killed
        sys.stdin.read()
        os._exit(0)
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def outside_of_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("SLURM_", "TORCHELASTIC_"))]:
        monkeypatch.delenv(name)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "BEAT_S", 0.1)


@contextmanager
def elsewhere(folder: Path, *, beats: bool, job: str = "") -> Iterator[Holder]:
    """A holder on another machine, from which ``flock`` does not reach this one."""
    holder = replace(Holder.me(), host="far-away", pid=1, job=job, launch="theirs")
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            (folder / "new").write_text(json.dumps(asdict(replace(holder, beat=number))))
            os.replace(folder / "new", folder / HOLDER)
            number += 1
            stop.wait(0.05 if beats else 60)

    thread = threading.Thread(target=write)
    thread.start()
    while not (folder / HOLDER).exists():
        time.sleep(0.01)
    try:
        yield holder
    finally:
        stop.set()
        thread.join()


def test_a_folder_is_free_again_after_a_run(tmp_path: Path) -> None:
    for _ in range(2):
        with only_run_in(tmp_path / "run"):
            assert json.loads((tmp_path / "run" / HOLDER).read_text())["pid"] == os.getpid()
        assert (tmp_path / "run" / HOLDER).read_text() == ""


@pytest.mark.slow
def test_a_second_run_is_refused_and_a_dead_one_is_succeeded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdin is not None and other.stdout is not None and other.stdout.readline() == "held\n"
        said = f"is in use by process {other.pid} on .*; wait for its end"
        with pytest.raises(ConfigError, match=said), only_run_in(tmp_path):
            pytest.fail("there were two")
        other.send_signal(signal.SIGSTOP)  # standing still is not dead
        with pytest.raises(ConfigError), only_run_in(tmp_path):
            pytest.fail("there were two")
    finally:
        other.kill()
        other.wait()
    with caplog.at_level("INFO"), only_run_in(tmp_path):
        assert f"taken over from process {other.pid} on" in caplog.text
    other.stdin.close()


def test_the_heartbeat_of_a_live_run_far_away_is_seen(tmp_path: Path, quick: None) -> None:
    refused = pytest.raises(ConfigError, match="process 1 on far-away")
    with elsewhere(tmp_path, beats=True), refused, only_run_in(tmp_path):
        pytest.fail("there were two")


def test_a_run_far_away_without_heartbeat_is_dead(tmp_path: Path, quick: None) -> None:
    with elsewhere(tmp_path, beats=False):
        begin = time.monotonic()
        with only_run_in(tmp_path):
            assert time.monotonic() - begin >= run_lock.MISSED_BEATS * run_lock.BEAT_S


def test_an_earlier_start_of_the_same_job_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setattr(run_lock, "_lives", lambda *_: pytest.fail("watched"))
    with elsewhere(tmp_path, beats=False, job="12"), only_run_in(tmp_path):
        pass


def test_a_run_whose_folder_was_taken_ends_itself(tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()
    monkeypatch.setattr(os, "_exit", lambda code: ended.set())
    with only_run_in(tmp_path), elsewhere(tmp_path, beats=True):
        assert ended.wait(10)


def test_waiting_ends_with_the_other_run_or_with_what_it_was_for(tmp_path: Path) -> None:
    kept = tmp_path / "weights"
    begun, go_on = threading.Event(), threading.Event()

    def other(finish: bool) -> None:
        with only_run_in(tmp_path):
            begun.set()
            go_on.wait(10)
            if finish:
                kept.touch()

    for finish in (False, True):
        begun.clear()
        go_on.clear()
        thread = threading.Thread(target=other, args=(finish,))
        thread.start()
        assert begun.wait(10)
        threading.Timer(0.3, go_on.set).start()
        with only_run_in(tmp_path, wait_until=kept.exists):
            assert go_on.is_set()
            assert kept.exists() is finish
        thread.join()


def test_other_ranks_wait_for_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a job of SLURM, where the lock of another job is not theirs to go by."""
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    monkeypatch.setattr("qtrain.training.ranks.POLL_S", 0.02)
    passed = threading.Event()

    def second() -> None:
        with only_run_in(tmp_path, wait_until=lambda: False):
            passed.set()

    (tmp_path / HOLDER).write_text(json.dumps(asdict(replace(Holder.me(), launch="slurm-11-0-0", pid=1))))
    thread = threading.Thread(target=second)
    thread.start()
    assert not passed.wait(0.2)
    (tmp_path / HOLDER).write_text(json.dumps(asdict(Holder.me())))
    assert passed.wait(10)
    thread.join()
