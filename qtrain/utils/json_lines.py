"""Files of one JSON object a line, in which a killed writer may have left half a line."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

_Row = TypeVar("_Row")


def append_line(path: Path, row: Mapping[str, Any], *, sync: bool = False) -> None:
    """Add ``row`` to ``path`` in one write. The file and its folder are made where absent.

    It is with the operating system when this returns, and with ``sync`` on the disk. Half a line that a killed writer
    left is ended first, so that it does not spoil this one.
    """
    line = json.dumps(row).encode() + b"\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b", buffering=0) as file:
        if file.seek(0, os.SEEK_END) and not _ends_a_line(file.fileno()):
            line = b"\n" + line
        file.write(line)
        if sync:
            os.fsync(file.fileno())


def read_lines(path: Path, parse: Callable[[dict[str, Any]], _Row]) -> tuple[list[_Row], list[int]]:
    """What ``parse`` makes of the object of each line, and the numbers (from 1) of the lines that hold none.

    ``parse`` refuses an object by a ``ValueError`` or ``TypeError``. Where there is no file, there are no lines.
    """
    if not path.is_file():
        return [], []
    parsed, damaged = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"an object was expected, got {line}")
            parsed.append(parse(row))
        except (ValueError, TypeError):
            damaged.append(number)
    return parsed, damaged


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The rows of a ``metrics.jsonl``, each with its ``step``, and the numbers of the lines that are no row."""
    return read_lines(path, _metric_row)


def _metric_row(row: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(row.get("step"), int | float):
        raise ValueError("a row of metrics has a step")
    return row


def _ends_a_line(descriptor: int) -> bool:
    return os.pread(descriptor, 1, os.fstat(descriptor).st_size - 1) == b"\n"
