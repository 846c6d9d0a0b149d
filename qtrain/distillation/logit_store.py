"""A teacher's answers on disk, a file for each epoch and rank; an incomplete file counts as absent.

    <folder>/<name>-<key>/manifest.json                   what the answers depend on
                          epoch-00003.rank0.safetensors   sample numbers and their rows

The key is a hash of the manifest: another teacher, seed or augmentation is another folder. Each file carries a SHA-256
of the key, its epoch and its content, so that a file that was damaged, half written, renamed or copied from elsewhere
is found out. Files appear whole, under their name, or not at all; writers that meet in one folder add to each other.
"""

import contextlib
import hashlib
import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qtrain.utils.atomic_write import atomic_write, write_text

log = logging.getLogger(__name__)

LOGITS_FORMAT = 1
"""Part of every key; raised when the meaning of the files changes."""

LOGITS_MANIFEST = "manifest.json"
_SAMPLE = "sample"
_ABANDONED_S = 24 * 3600.0


class LogitRows(NamedTuple):
    """Answers by sample: ``sample`` (n,) int64 without repetition, and columns (n, width) by name; on the CPU."""

    sample: Tensor
    columns: dict[str, Tensor]

    def find(self, sample: Tensor) -> Tensor | None:
        """The places (m,) int64 of these sample numbers (m,) int64, or ``None`` unless all of them are there."""
        size = max((int(numbers.max()) + 1 for numbers in (sample, self.sample) if len(numbers)), default=0)
        place = torch.full((size,), -1)
        place[self.sample] = torch.arange(len(self.sample))
        found = place[sample]
        return found if bool((found >= 0).all()) else None


def merge(first: LogitRows, second: LogitRows) -> LogitRows:
    """All rows of ``second``, and the rows of ``first`` for other samples."""
    more = ~torch.isin(first.sample, second.sample)
    columns = {name: torch.cat([first.columns[name][more], column]) for name, column in second.columns.items()}
    return LogitRows(torch.cat([first.sample[more], second.sample]), columns)


@final
class LogitStore:
    """The files of one teacher under one augmentation, which ``description`` (plain values) tells from all others."""

    def __init__(self, folder: str | Path, *, name: str, description: Mapping[str, Any]) -> None:
        self._manifest = json.dumps({"format": LOGITS_FORMAT, **description}, indent=2, sort_keys=True) + "\n"
        self.key = hashlib.sha256(self._manifest.encode()).hexdigest()[:24]
        self.folder = Path(folder).expanduser() / f"{name}-{self.key}"

    def read(self, epoch: int) -> LogitRows | None:
        """All answers of ``epoch`` that are kept, of all ranks; ``None`` where there are none."""
        rows = None
        for path in sorted(self.folder.glob(f"epoch-{epoch:05d}.rank*.safetensors")):
            if (shard := self._read(path, epoch)) is not None:
                rows = shard if rows is None else merge(rows, shard)
        return rows

    def write(self, epoch: int, rank: int, rows: LogitRows) -> None:
        """Add ``rows`` to the answers of ``epoch`` that this rank has kept in this run or earlier ones. Raises
        ``OSError``."""
        path = self.folder / f"epoch-{epoch:05d}.rank{rank}.safetensors"
        before = self._read(path, epoch)
        if before is not None:
            if before.find(rows.sample) is not None:
                return
            rows = merge(before, rows)
        self._describe()
        self._sweep()
        tensors = {_SAMPLE: rows.sample, **rows.columns}
        with atomic_write(path) as temporary:
            save_file(tensors, temporary, metadata={"sha256": self._digest(epoch, tensors)})

    def _describe(self) -> None:
        """Write the manifest if it is absent or wrong; the other files carry their own checksums."""
        path = self.folder / LOGITS_MANIFEST
        try:
            if path.read_text(encoding="utf-8") == self._manifest:
                return
            log.warning("%s does not describe this folder's key; it is written anew", path)
        except FileNotFoundError:
            pass
        except ValueError:
            log.warning("%s is damaged; it is written anew", path)
        write_text(path, self._manifest)

    def _sweep(self) -> None:
        """Remove partial files of killed writers; a file younger than a day may still be in use by its writer."""
        for path in self.folder.glob(".*.tmp"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > _ABANDONED_S:
                    path.unlink()

    def _read(self, path: Path, epoch: int) -> LogitRows | None:
        try:
            with safe_open(path, framework="pt") as file:
                checksum = (file.metadata() or {}).get("sha256")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            self._discard(path, str(error).partition("\n")[0])
            return None
        if checksum != self._digest(epoch, tensors):
            self._discard(path, "its checksum is wrong")
            return None
        sample = tensors.pop(_SAMPLE)
        return LogitRows(sample, tensors)

    def _discard(self, path: Path, why: str) -> None:
        log.warning("the teacher's answers in %s are damaged (%s); they are made anew", path, why)
        with contextlib.suppress(OSError):
            path.unlink()

    def _digest(self, epoch: int, tensors: Mapping[str, Tensor]) -> str:
        digest = hashlib.sha256(f"{self.key} {epoch}".encode())
        for name in sorted(tensors):
            tensor = tensors[name].contiguous()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()
