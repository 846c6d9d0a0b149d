"""metrics.jsonl keeps every row once."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

import pytest

from qtrain.tracking.loggers import JsonlLogger, split_metrics
from qtrain.utils.json_lines import read_metrics


def test_rows_have_split_step_epoch_and_time(tmp_path: Path) -> None:
    logger = JsonlLogger(folder=tmp_path / "run")
    before = time.time()
    logger.log_metrics({"train/loss": 0.5, "train/scale/conv1.weight": 0.1, "epoch": 2}, step=7)
    logger.log_metrics({"val/top1": 90.0, "test/top1": 80.0, "temperature": 4.0, "epoch": 3}, step=8)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")[0]  # flushed, though not closed
    assert all(before - 1 < row.pop("time") < time.time() + 1 for row in rows)
    assert rows == [
        {"step": 7, "epoch": 2, "split": "train", "loss": 0.5, "scale/conv1.weight": 0.1},
        {"step": 8, "epoch": 3, "split": "val", "top1": 90.0},
        {"step": 8, "epoch": 3, "split": "test", "top1": 80.0},
        {"step": 8, "epoch": 3, "split": "train", "temperature": 4.0},
    ]


def test_metric_names_with_an_unknown_prefix_count_as_train() -> None:
    assert split_metrics({"valid/x": 1.0, "val": 2.0}) == {"train": {"valid/x": 1.0, "val": 2.0}}


def test_values_that_are_not_finite_are_null(tmp_path: Path) -> None:
    JsonlLogger(folder=tmp_path).log_metrics({"loss": math.nan, "norm": math.inf}, step=1)
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    (row,) = read_metrics(tmp_path / "metrics.jsonl")[0]
    assert row["loss"] is None and row["norm"] is None


def test_rewind_removes_later_rows_and_unfinished_lines(tmp_path: Path) -> None:
    logger = JsonlLogger(folder=tmp_path)
    logger.log_metrics({"loss": 1.0}, step=1)
    position = logger.position()
    logger.log_metrics({"loss": 2.0}, step=2)
    with logger.path.open("ab") as file:
        file.write(b'{"step": 3, "lo')
    assert [row["step"] for row in read_metrics(logger.path)[0]] == [1, 2]

    again = JsonlLogger(folder=tmp_path)  # another process, later
    again.rewind(position)
    again.log_metrics({"loss": 2.5}, step=2)
    assert [row["loss"] for row in read_metrics(again.path)[0]] == [1.0, 2.5]


def test_rewind_of_a_shortened_file_is_logged_and_keeps_whole_lines(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logger = JsonlLogger(folder=tmp_path)
    for step in (1, 2):
        logger.log_metrics({"loss": 1.0}, step=step)
    position = logger.position()
    os.truncate(logger.path, position - 5)
    logger.rewind(position)
    assert "rows are missing" in caplog.text
    assert [row["step"] for row in read_metrics(logger.path)[0]] == [1]
