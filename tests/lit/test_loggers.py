"""metrics.jsonl keeps every row once; W&B never holds a run up."""

from __future__ import annotations

import logging
import math
import os
import socket
import time
from pathlib import Path

import pytest

from qtrain.lit import loggers
from qtrain.lit.loggers import JsonlLogger, close, make_wandb_logger, read_rows, split_metrics, wandb_mode


def test_rows_carry_split_step_epoch_and_time(tmp_path: Path) -> None:
    logger = JsonlLogger(folder=tmp_path / "run")
    before = time.time()
    logger.log_metrics({"train/loss": 0.5, "train/scale/conv1.weight": 0.1, "epoch": 2}, step=7)
    logger.log_metrics({"val/top1": 90.0, "test/top1": 80.0, "temperature": 4.0, "epoch": 3}, step=8)
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")  # flushed, though not closed
    assert all(before - 1 < row.pop("time") < time.time() + 1 for row in rows)
    assert rows == [
        {"step": 7, "epoch": 2, "split": "train", "loss": 0.5, "scale/conv1.weight": 0.1},
        {"step": 8, "epoch": 3, "split": "val", "top1": 90.0},
        {"step": 8, "epoch": 3, "split": "test", "top1": 80.0},
        {"step": 8, "epoch": 3, "split": "train", "temperature": 4.0},
    ]


def test_names_that_only_look_like_a_split() -> None:
    assert split_metrics({"valid/x": 1.0, "val": 2.0}) == {"train": {"valid/x": 1.0, "val": 2.0}}


def test_not_finite_is_null(tmp_path: Path) -> None:
    JsonlLogger(folder=tmp_path).log_metrics({"loss": math.nan, "norm": math.inf}, step=1)
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    (row,) = read_rows(tmp_path / "metrics.jsonl")
    assert row["loss"] is None and row["norm"] is None


def test_rewind_drops_later_rows_and_half_lines(tmp_path: Path) -> None:
    logger = JsonlLogger(folder=tmp_path)
    logger.log_metrics({"loss": 1.0}, step=1)
    position = logger.position()
    logger.log_metrics({"loss": 2.0}, step=2)
    with logger.path.open("ab") as file:
        file.write(b'{"step": 3, "lo')
    assert [row["step"] for row in read_rows(logger.path)] == [1, 2]

    again = JsonlLogger(folder=tmp_path)  # another process, later
    again.rewind(position)
    again.log_metrics({"loss": 2.5}, step=2)
    assert [row["loss"] for row in read_rows(again.path)] == [1.0, 2.5]


def test_rewind_of_a_shortened_file_says_so_and_keeps_whole_lines(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logger = JsonlLogger(folder=tmp_path)
    for step in (1, 2):
        logger.log_metrics({"loss": 1.0}, step=step)
    position = logger.position()
    os.truncate(logger.path, position - 5)
    logger.rewind(position)
    assert "rows are missing" in caplog.text
    assert [row["step"] for row in read_rows(logger.path)] == [1]


@pytest.fixture
def no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: object())


def test_wandb_is_offline_without_a_key(no_key: None) -> None:
    mode, reason = wandb_mode(mode="online", host_timeout_s=0.1)
    assert mode == "offline" and "no key for api.wandb.ai" in reason


def test_wandb_is_offline_without_a_network_and_soon(no_key: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:  # bound but not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{taken.getsockname()[1]}")
        start = time.perf_counter()
        mode, reason = wandb_mode(mode="online", host_timeout_s=0.5)
    assert mode == "offline" and "not reachable" in reason
    assert time.perf_counter() - start < 3


def test_wandb_is_online_where_a_server_listens(no_key: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
        (Path(os.environ["HOME"]) / ".netrc").write_text("machine 127.0.0.1\n  login user\n  password key\n")
        (Path(os.environ["HOME"]) / ".netrc").chmod(0o600)
        assert wandb_mode(mode="online", host_timeout_s=1.0)[0] == "online"
        monkeypatch.setenv("WANDB_MODE", "offline")
        assert wandb_mode(mode="online", host_timeout_s=1.0)[0] == "offline"


def test_wandb_is_off_where_it_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None)
    with caplog.at_level(logging.INFO):
        assert make_wandb_logger(folder=tmp_path) is None
    assert "not installed" in caplog.text
    close([None])


def test_wandb_mode_typo(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be online, offline or disabled, got 'ofline'"):
        make_wandb_logger(folder=tmp_path, mode="ofline")


def test_wandb_offline_run_is_written_and_one_line_says_so(
    no_key: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.undo()
    pytest.importorskip("wandb")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, "")  # so that it is restored afterwards whatever the test sets
        monkeypatch.delenv(name)
    with caplog.at_level(logging.INFO, logger="qtrain"):
        logger = make_wandb_logger(folder=tmp_path / "run", config={"bits": 4})
    assert logger is not None
    assert len(caplog.records) == 1 and "wandb sync" in caplog.text
    logger.log_metrics({"train/loss": 1.0}, step=1)
    close([logger])
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert os.environ["WANDB_DATA_DIR"] == str(tmp_path / "run" / "wandb")
    first = (tmp_path / "run" / "wandb_run_id.txt").read_text()
    again = make_wandb_logger(folder=tmp_path / "run")
    assert again is not None and again.version == first.strip()
