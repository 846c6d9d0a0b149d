"""Signals that reach a loader's workers."""

from __future__ import annotations

import os
import signal
import time

from torch.utils.data import DataLoader, get_worker_info

from qtrain.data.workers import outlive_sigterm


class Pids:
    """Each item is the number of the process that made it."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> int:
        assert get_worker_info() is not None
        return os.getpid()


def test_a_worker_outlives_one_sigterm_and_goes_with_its_loader() -> None:
    loader = DataLoader(Pids(), batch_size=None, num_workers=1, worker_init_fn=outlive_sigterm)  # type: ignore[arg-type]
    batches = iter(loader)
    worker = next(batches)
    os.kill(worker, signal.SIGTERM)
    assert list(batches) == [worker] * 19
    del batches
    end = time.monotonic() + 30
    while os.path.exists(f"/proc/{worker}") and time.monotonic() < end:
        time.sleep(0.02)
    assert not os.path.exists(f"/proc/{worker}")


def test_a_second_sigterm_ends_a_worker() -> None:
    pid = os.fork()
    if pid == 0:
        outlive_sigterm(0)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM
