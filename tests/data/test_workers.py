"""Signals that reach a loader's workers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = """
import os, sys
from torch.utils.data import DataLoader
from qtrain.data.workers import outlive_sigterm

class Pids:  # each item is the number of the process that made it
    def __len__(self): return 20
    def __getitem__(self, index): return os.getpid()

loader = DataLoader(Pids(), batch_size=None, num_workers=1, worker_init_fn=outlive_sigterm, persistent_workers=True)
batches = iter(loader)
print(next(batches), flush=True)
sys.stdin.readline()
print(len(set(batches)), flush=True)
sys.stdin.readline()
"""


def gone(pid: int) -> bool:
    end = time.monotonic() + 30
    while time.monotonic() < end:
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


@pytest.mark.slow
@pytest.mark.parametrize("killed", [False, True])
def test_worker_survives_sigterm_of_others_and_ends_with_its_owner(killed: bool) -> None:
    owner = subprocess.Popen([sys.executable, "-c", SCRIPT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert owner.stdin is not None and owner.stdout is not None
    try:
        worker = int(owner.stdout.readline())
        for _ in range(2):
            os.kill(worker, signal.SIGTERM)  # from this process, which is not its owner
        owner.stdin.write("\n")
        owner.stdin.flush()
        assert owner.stdout.readline() == "1\n"
        if killed:
            owner.kill()
        else:
            owner.stdin.write("\n")
            owner.stdin.flush()
        assert owner.wait(30) == (-signal.SIGKILL if killed else 0)
        assert gone(worker)
    finally:
        owner.kill()
        owner.wait()
