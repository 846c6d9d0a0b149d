"""Files of one JSON object a line, whose last line a killed writer may have left unfinished."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``; a last line that was cut off by a kill is left out."""
    lines = Path(path).read_bytes().split(b"\n")
    return [json.loads(line) for line in lines[:-1] if line]


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The rows of a ``metrics.jsonl`` and how many lines were no row; none of either where there is no file.

    A killed run leaves half a line behind, so that a damaged one is no reason to show nothing.
    """
    if not path.is_file():
        return [], 0
    rows, damaged = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int | float):
            rows.append(row)
        elif line.strip():
            damaged += 1
    return rows, damaged
