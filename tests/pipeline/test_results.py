"""Result rows: header, further columns, several writers, and where numbers come from."""

from __future__ import annotations

import multiprocessing
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest

from qtrain.pipeline.results import HEADER, append_row, commit, hardware, provenance, read_results
from qtrain.settings.run_identity import hash_of


def test_a_row_comes_back_under_the_header(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "results.csv"
    append_row(path, {"dataset": "digits", "top1": 91.23456789, "seed": 0, "distill": None, "notes": 'a, "b"'})
    assert path.read_text().splitlines()[0] == ",".join(HEADER)
    (row,) = read_results(path)
    assert (row["dataset"], row["top1"], row["seed"], row["distill"]) == ("digits", "91.2346", "0", "")
    assert row["notes"] == 'a, "b"'


def test_rows_are_appended_in_order(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    for seed in range(3):
        append_row(path, {"seed": seed, "bops": 40_551_040 * 1024})
    assert [row["seed"] for row in read_results(path)] == ["0", "1", "2"]
    assert read_results(path)[0]["bops"] == "41524264960"


def test_further_columns_go_behind_and_stay_empty_before(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    append_row(path, {"seed": 0})
    append_row(path, {"seed": 1, "latency_ms": 2.5})
    append_row(path, {"seed": 2})
    assert path.read_text().splitlines()[0] == ",".join([*HEADER, "latency_ms"])
    assert [row["latency_ms"] for row in read_results(path)] == ["", "2.5", ""]


def test_a_foreign_file_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "other.csv"
    path.write_text("name,age\nAda,36\n")
    with pytest.raises(ValueError, match="does not start with the columns"):
        append_row(path, {"seed": 0})
    assert path.read_text() == "name,age\nAda,36\n"


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.csv"):
        read_results(tmp_path / "absent.csv")


def _append_ten(path: Path, seed: int) -> None:
    for epoch in range(10):
        append_row(path, {"seed": seed, "epochs": epoch})


def test_writers_at_the_same_time_lose_no_row(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_append_ten, args=(path, seed)) for seed in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    rows = read_results(path)
    assert sorted((int(row["seed"]), int(row["epochs"])) for row in rows) == [
        (s, e) for s in range(4) for e in range(10)
    ]
    assert {file.name for file in tmp_path.iterdir()} == {"results.csv", ".results.csv.lock"}


def test_config_hash_sees_values_and_not_the_order_or_the_place() -> None:
    config = {"seed": 0, "quantize": {"bits": 4, "first": 8}, "output": "/a"}
    same = {"output": "/b", "quantize": {"first": 8, "bits": 4}, "seed": 0}
    assert hash_of(config) == hash_of(same)
    assert len(hash_of(config)) == 12
    assert hash_of(config) != hash_of(config | {"seed": 1})
    assert hash_of(config) != hash_of(config | {"quantize": {"bits": 4, "first": 4}})


def _git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    done = subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_commit_says_when_the_code_differs(tmp_path: Path) -> None:
    package = tmp_path / "qtrain"
    package.mkdir()
    (package / "a.py").write_text("x = 1\n")
    assert commit(package).startswith("v")  # no checkout around it, as in a wheel
    _git(tmp_path, "init", "-q")
    _git(tmp_path, "add", "qtrain")
    _git(tmp_path, "commit", "-q", "-m", "first")
    head = _git(tmp_path, "rev-parse", "--short=12", "HEAD")
    (tmp_path / "results.csv").write_text("a result is no change of the code\n")
    assert commit(package) == head
    (package / "a.py").write_text("x = 2\n")
    assert commit(package) == f"{head}+dirty"


def test_provenance_fills_its_columns() -> None:
    row = provenance("cpu")
    assert all(row[name] for name in ("date", "commit", "hardware", "torch", "timm", "lightning", "python"))
    when = datetime.strptime(row["date"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    assert abs((datetime.now(UTC) - when).total_seconds()) < 60
    assert hardware("cpu").endswith("cores")
