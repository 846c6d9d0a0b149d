"""What resident and streaming loaders have in common: an epoch, a place in it, and exact resumption.

Because everything random is a function of (seed, epoch, sample), the whole state of a loader is two
numbers: the epoch, and how many of its batches were handed out. No generator state, no worker snapshots; a run may
resume with another number of workers or ranks.

Lightning saves and restores ``state_dict`` with its own progress, but creates the iterator before it tells the
sampler which epoch it is. So ``__iter__`` is a generator: it looks at the epoch only when the first batch is asked
for.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from qtrain.data.order import BatchOrder
from qtrain.spec import NO_LABEL, Batch


class EpochLoader(ABC):
    """An iterable over the batches of the current epoch, resumable at any batch."""

    batch_sampler = None
    """Lightning asks each loader that has a ``sampler`` for this one too."""

    def __init__(self, order: BatchOrder) -> None:
        self._order = order
        self._labeled = order.labeled
        self._epoch = 0
        self._handed_out = 0
        self._resuming = False

    @abstractmethod
    def _batches(self, epoch: int, start: int) -> Iterator[Batch]:
        """The batches of ``epoch`` from number ``start`` on."""

    @property
    def sampler(self) -> BatchOrder:
        """What Lightning calls ``set_epoch`` on."""
        return self._order

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration goes through."""
        self._order.set_epoch(epoch)

    def __len__(self) -> int:
        """Batches in a whole epoch, also after resuming in the middle of one."""
        return len(self._order)

    def __iter__(self) -> Iterator[Batch]:
        epoch = self._order.epoch
        start = self._handed_out if self._resuming and self._epoch == epoch else 0
        self._resuming = False
        self._epoch, self._handed_out = epoch, start
        for batch in self._batches(epoch, start):
            self._handed_out += 1
            yield batch if self._labeled is None else self._as_labeled(batch, self._labeled)

    def _as_labeled(self, batch: Batch, labeled: Tensor) -> Batch:
        """``batch`` without the labels that the order hides."""
        if labeled.device != batch.index.device:
            self._labeled = labeled = labeled.to(batch.index.device)  # once
        return batch._replace(target=batch.target.masked_fill(~labeled[batch.index], NO_LABEL))

    def state_dict(self) -> dict[str, Any]:
        """Where the loader is, and what that depends on; plain numbers only."""
        return {"epoch": self._epoch, "batches": self._handed_out, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the batch that was handed out last when ``state`` was saved.

        If the epoch set before the next iteration is another one than the state's, that epoch starts at its
        beginning. Raises ValueError if the state belongs to another order of samples.
        """
        for key, value in self._identity().items():
            if state.get(key) != value:
                raise ValueError(
                    f"{type(self).__name__}: cannot resume within an epoch, {key} was {state.get(key)} when the "
                    f"checkpoint was written and is {value} now; restore it, or start a new run"
                )
        self._epoch, self._handed_out = int(state["epoch"]), int(state["batches"])
        self._resuming = True

    def _identity(self) -> dict[str, int]:
        order = self._order
        return {"seed": order.seed, "batch_size": order.batch_size, "samples": len(order.samples)}
