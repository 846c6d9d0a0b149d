"""What all loaders' worker processes do: how they take signals, and a pass over a whole set before a run."""

import os
import signal
import threading
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from qtrain.utils.progress import tracked

T = TypeVar("T")

CHUNK = 32
"""Items that a worker reads before it reports."""


def each_item(items: Dataset[T], *, total: int, workers: int, title: str, unit: str) -> Iterator[T]:
    """What ``items`` gives for 0 to ``total - 1``, in order; shows progress. Draws no random numbers."""
    chunks: DataLoader[T] = DataLoader(
        items,
        batch_size=CHUNK,
        num_workers=workers,
        collate_fn=list,
        generator=torch.Generator(),  # the global one is left alone
        worker_init_fn=outlive_sigterm,
    )
    return tracked((item for chunk in chunks for item in chunk), total=total, title=title, unit=unit)


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
