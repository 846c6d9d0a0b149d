"""Lines of JSON: whole ones are read, damaged ones are counted, and half a line does not spoil the next."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from qtrain.utils import json_lines
from qtrain.utils.json_lines import append_line, read_lines, read_metrics


def test_damaged_lines_are_numbered_and_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    good: list[dict[str, Any]] = [{"step": 1, "total": 2.0}, {"step": 2, "total": None}]
    lines = [json.dumps(good[0]), "[1, 2]", '{"no": "step"}', "", json.dumps(good[1]), '{"step": 3, "to']
    path.write_text("\n".join(lines))
    assert read_metrics(path) == (good, [2, 3, 6])
    assert read_metrics(tmp_path / "absent.jsonl") == ([], [])


def test_what_parse_refuses_is_damaged(tmp_path: Path) -> None:
    for row in ({"a": 1}, {"b": 2}, {"a": 3}):
        append_line(tmp_path / "rows.jsonl", row)

    def only_a(a: int) -> int:
        return a

    assert read_lines(tmp_path / "rows.jsonl", lambda row: only_a(**row)) == ([1, 3], [2])


@pytest.mark.parametrize("sync", [False, True])
@pytest.mark.parametrize("left", ["", '{"x": 7', '{"x": 7}'])
def test_append_line_after_half_a_line(tmp_path: Path, left: str, sync: bool) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    append_line(path, {"x": 1}, sync=sync)
    path.write_text(path.read_text() + left)
    append_line(path, {"x": 2}, sync=sync)
    rows, damaged = read_lines(path, dict)
    whole = [{"x": 7}] if left.endswith("}") else []
    assert rows == [{"x": 1}, *whole, {"x": 2}]
    assert damaged == ([2] if left and not whole else [])


@pytest.mark.parametrize("sync", [False, True])
def test_appended_line_is_on_the_disk_where_that_was_asked_for(
    tmp_path: Path, sync: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the operating system was asked to write to the disk, and whether the line was in it by then."""
    on_disk: list[str] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        on_disk.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).read_text())
        fsync(descriptor)

    monkeypatch.setattr(json_lines.os, "fsync", noted)
    append_line(tmp_path / "rows.jsonl", {"x": 1}, sync=sync)
    assert on_disk == (['{"x": 1}\n'] if sync else [])
