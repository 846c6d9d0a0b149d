"""A teacher whose answers are kept on disk, so that a later run need not ask again.

The augmentation of a sample is a function of (seed, epoch, sample), so the teacher's answer is one too: Beyer et al.'s
consistent teacher (arXiv 2106.05237), who sees just the student's view, at the price of FKD's stored labels
(arXiv 2112.01528).
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self, final

import torch
from torch import Tensor

from qtrain.distillation.logit_format import LogitFormat
from qtrain.distillation.logit_store import LogitRows, LogitStore
from qtrain.models.teacher import FrozenTeacher, Teacher
from qtrain.spec import Batch

log = logging.getLogger(__name__)


class _Epoch(NamedTuple):
    """One epoch's answers on the device: row ``row_of[s]`` of each column is sample s's; ``known`` says which are."""

    number: int
    rank: int
    sample: Tensor
    row_of: Tensor
    columns: dict[str, Tensor]
    known: Tensor
    replayed: bool

    def to(self, device: torch.device | str) -> "_Epoch":
        columns = {name: column.to(device) for name, column in self.columns.items()}
        return self._replace(row_of=self.row_of.to(device), columns=columns, known=self.known.to(device))


@final
class CachedTeacher(Teacher):
    """Answers from ``folder`` if it holds all that an epoch needs; otherwise asks ``live`` and keeps the answers.

    ``data`` (plain values, as ``VisionData.identity`` gives them) and the teacher's own ``identity`` name the folder.
    ``keeps`` is the format of the answers. The run that writes them also passes them through this format, so that runs
    which replay them train the same: bit for bit on a machine that computes like the writer's. Another batch size,
    ``torch.compile`` or another device may round the live teacher's last bit differently.

    Whether an epoch is replayed is decided when it begins; a step is an ``index_select`` and waits for nothing.
    Raises ``ValueError`` where ``live`` gives features: they are too large to keep.
    """

    def __init__(self, live: FrozenTeacher, *, data: Mapping[str, Any], keeps: LogitFormat, folder: str | Path) -> None:
        if live.names:
            raise ValueError(
                f"CachedTeacher: keeps logits and no features, but hints look at {', '.join(live.names)}; ask the live "
                "teacher (teacher_cache=none), or leave the hints out"
            )
        self._live = live
        self._data = data
        self._keeps = keeps
        self._folder = folder
        self._device: torch.device | str = "cpu"
        self._store: LogitStore | None = None
        self._epoch: _Epoch | None = None
        self._unsaved = False
        self._failed = False

    @property
    def names(self) -> tuple[str, ...]:
        return ()

    def to(self, device: torch.device | str, memory_format: torch.memory_format = torch.preserve_format) -> Self:
        self._live.to(device, memory_format)
        self._device = device
        self._store = None  # its key names the kind of device
        self._epoch = self._epoch and self._epoch.to(device)
        return self

    def begin(self, epoch: int, samples: Tensor, *, rank: int = 0) -> None:
        """Make ready for ``samples`` (n,) int64, on the CPU: those of ``epoch`` that this rank will ask for."""
        self.flush()
        store = self._opened()
        kept = store.read(epoch)
        place = None if kept is None else kept.find(samples)
        if kept is not None and place is not None:
            columns = {name: column[place].to(self._device) for name, column in kept.columns.items()}
        else:
            columns = {
                name: torch.zeros(len(samples), column.width, dtype=column.dtype, device=self._device)
                for name, column in self._keeps.columns.items()
            }
        row_of = torch.full((int(samples.max()) + 1 if len(samples) else 0,), -1)
        row_of[samples] = torch.arange(len(samples))
        known = torch.full((len(samples),), place is not None, device=self._device)
        if self._epoch is None:
            how = "replayed from" if place is not None else "kept in"
            size = len(samples) * self._keeps.bytes_a_sample() / 1e6
            log.info("the teacher's answers are %s %s, %.1f MB an epoch", how, store.folder, size)
        self._epoch = _Epoch(epoch, rank, samples, row_of.to(self._device), columns, known, place is not None)

    @torch.no_grad()
    def answer(self, batch: Batch, epoch: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits (N, K) float32, and no features. An epoch that was not begun is answered live and not kept."""
        now = self._epoch
        if now is None or now.number != epoch:
            return self._keeps.decode(self._keeps.encode(self._ask(batch, epoch))), {}
        row = now.row_of.index_select(0, batch.index)
        if now.replayed:
            rows = {name: column.index_select(0, row) for name, column in now.columns.items()}
        else:
            rows = self._keeps.encode(self._ask(batch, epoch))
            for name, column in now.columns.items():
                column.index_copy_(0, row, rows[name])
            now.known.index_fill_(0, row, True)
            self._unsaved = True
        return self._keeps.decode(rows), {}

    def flush(self) -> None:
        """Write what is not on disk yet. If the disk refuses, a warning is logged, and later runs must ask their live
        teacher."""
        now = self._epoch
        if now is None or not self._unsaved or self._failed:
            return
        self._unsaved = False
        known, store = now.known.cpu(), self._opened()
        rows = LogitRows(now.sample[known], {name: column.cpu()[known] for name, column in now.columns.items()})
        try:
            store.write(now.number, now.rank, rows)
        except OSError as error:
            self._failed = True
            log.warning("cannot keep the teacher's answers in %s (%s); the teacher goes on live", store.folder, error)

    def _ask(self, batch: Batch, epoch: int) -> Tensor:
        return self._live.answer(batch, epoch)[0]

    def _opened(self) -> LogitStore:
        if self._store is None:
            description = {"data": self._data, "teacher": self._live.identity(), "keeps": self._keeps.describe()}
            self._store = LogitStore(self._folder, name=str(self._data.get("name", "data")), description=description)
        return self._store
