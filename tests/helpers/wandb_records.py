"""What an offline W&B run has on the disk, read from its transaction log: a LevelDB log of protocol buffers.

https://github.com/google/leveldb/blob/main/doc/log_format.md
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BLOCK, HEADER = 32768, 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


@dataclass
class Recorded:
    """A run as ``wandb sync`` would tell it to a server. ``artifacts`` are those of the log, by name."""

    id: str = ""
    project: str = ""
    group: str = ""
    job_type: str = ""
    name: str = ""
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    artifacts: dict[str, Any] = field(default_factory=dict)
    preempting: bool = False
    exit_code: int | None = None

    def rows(self, metric: str) -> list[dict[str, Any]]:
        """The rows that have ``metric``, without the client's own columns."""
        return [
            {name: value for name, value in row.items() if not name.startswith("_")}
            for row in self.history
            if metric in row
        ]


def read_run(folder: Path, patience_s: float = 60.0) -> Recorded:
    """The run in ``folder``, an ``offline-run-...``, once its end is written: the client writes behind."""
    end = time.monotonic() + patience_s
    while (run := _read(folder)).exit_code is None and time.monotonic() < end:
        time.sleep(0.05)
    return run


def _read(folder: Path) -> Recorded:
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("*.wandb")
    run = Recorded()
    for message in messages(path.read_bytes()):
        record = Record()
        record.ParseFromString(message)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run.id, run.project, run.group = record.run.run_id, record.run.project, record.run.run_group
            run.job_type, run.name, run.tags = record.run.job_type, record.run.display_name, list(record.run.tags)
            run.config |= {_name(item): json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "history":
            run.history.append({_name(item): json.loads(item.value_json) for item in record.history.item})
        elif kind == "summary":
            run.summary |= {_name(item): json.loads(item.value_json) for item in record.summary.update}
        elif kind == "metric":
            run.metrics[record.metric.name or record.metric.glob_name] = record.metric
        elif kind == "artifact":
            run.artifacts[record.artifact.name] = record.artifact
        elif kind == "preempting":
            run.preempting = True
        elif kind == "exit":
            run.exit_code = record.exit.exit_code
    return run


def messages(log: bytes) -> Iterator[bytes]:
    """The records of a LevelDB log, after the first 7 bytes, by which W&B marks its files."""
    assert b":W&B".startswith(log[:4]), log[:7]
    position, parts = HEADER, b""
    while position + HEADER <= len(log):
        left = BLOCK - position % BLOCK
        if left < HEADER:  # too little for a header: filled with zeros
            position += left
            continue
        length, kind = int.from_bytes(log[position + 4 : position + 6], "little"), log[position + 6]
        if position + HEADER + length > len(log):
            return  # not written to its end yet
        parts += log[position + HEADER : position + HEADER + length]
        position += HEADER + length
        if kind in (FULL, LAST):
            yield parts
            parts = b""


def _name(item: Any) -> str:
    """``val/top1.max`` for a value that is nested in another."""
    return item.key or ".".join(item.nested_key)
