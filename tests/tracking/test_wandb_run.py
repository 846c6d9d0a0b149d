"""A run in W&B, by the real client: what is on the disk offline, what a server gets, and what happens without one."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from qtrain.tracking.loggers import JsonlLogger, close
from qtrain.tracking.wandb_client import artifact_name, named_knobs, run_id
from qtrain.tracking.wandb_run import WandbRun
from qtrain.utils.errors import RunInterruptedError
from qtrain.utils.json_lines import read_metrics
from tests.helpers.wandb_records import Recorded, read_run
from tests.helpers.wandb_server import WandbServer

LAYERS = [
    {"name": "conv1", "kind": "conv2d", "weights": 54, "weight_bits": 8, "input_bits": 8, "macs": 100, "bops": 6400},
    {"name": "fc", "kind": "linear", "weights": 30, "weight_bits": 2, "input_bits": 4, "macs": 30, "bops": 240},
]


def rows_of(run: WandbRun, steps: range) -> None:
    """A training and a validation row at each of ``steps``; accuracy falls from 90, so that best is not last."""
    for step in steps:
        run.log_metrics({"train/total": 1 / (step + 1), "epoch": step}, step=10 * step)
        run.log_metrics({"val/top1": 90.0 - step, "val/loss": 0.5, "epoch": step}, step=10 * step)


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The lines that a user sees of ours."""
    return [record.message for record in caplog.records if record.name.startswith("qtrain")]


def parts(folder: Path) -> list[Path]:
    return sorted((folder / "wandb").glob("offline-run-*"))


def offline(folder: Path) -> Recorded:
    (part,) = parts(folder)
    return read_run(part)


def the_run(server: WandbServer) -> dict[str, Any]:
    """The only run of the server, all of whose questions it could answer."""
    state = server.state()
    assert state["unknown"] == []
    (run,) = state["runs"].values()
    return dict(run)


def metrics(rows: list[dict[str, Any]], metric: str) -> list[tuple[int, float]]:
    return [(row["step"], row[metric]) for row in rows if metric in row]


def test_offline_run_is_complete_on_the_disk(
    wandb_client: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, weights, student = tmp_path / "run", tmp_path / "cache" / "model.safetensors", tmp_path / "student.bin"
    weights.parent.mkdir()
    weights.write_bytes(b"teacher")
    student.write_bytes(b"student")
    with caplog.at_level(logging.INFO, logger="qtrain"):
        run = WandbRun(
            folder=folder,
            config={"fit": {"epochs": 3}},
            project="tests",
            group="sweep-1",
            job_type="trial",
            name="trial 7",
            tags=["a", "b"],
            knobs={"optimizer.lr": 0.01, "unused": None},
        )
        run.log_layers(LAYERS)
        rows_of(run, range(3))
        run.log_metrics({"val/top1": float("nan"), "epoch": 3}, step=30)
        run.summarize({"size_bytes": 1234, "bops": 6640, "top1": None, "ptq_top1": float("inf")})
        run.use_files({"model.safetensors": weights}, name="teacher/56", kind="model")
        run.use_files({"model.safetensors": weights}, name="teacher/56", kind="model")
        run.keep_files({"student.bin": student}, name="student", kind="model", about={"top1": 90.0})
        close([run])
    (line,) = told(caplog)
    assert f"wandb sync {parts(folder)[0]}" in line and "no key" in line

    found = offline(folder)
    assert (found.id, found.project, found.group, found.job_type) == (run_id(folder), "tests", "sweep-1", "trial")
    assert (found.name, found.tags, found.exit_code, found.preempting) == ("trial 7", ["a", "b"], 0, False)
    assert found.config["fit"] == {"epochs": 3} and found.config["knobs"] == {"optimizer_lr": 0.01}
    assert found.rows("train/total") == [{"step": 10 * s, "epoch": s, "train/total": 1 / (s + 1)} for s in range(3)]
    assert [(row["epoch"], row["val/top1"]) for row in found.rows("val/top1")] == [(0, 90.0), (1, 89.0), (2, 88.0)]
    assert found.rows("bits/weight") == [
        {"layer": 0, "bits/weight": 8, "bits/input": 8},
        {"layer": 1, "bits/weight": 2, "bits/input": 4},
    ]
    # Not a number is left out: it would be the maximum for good.
    assert found.summary["val/top1"] == {"max": 90.0, "last": 88.0}
    assert (found.summary["best_val_top1"], found.summary["val_top1"]) == (90.0, 88.0)
    assert (found.summary["size_bytes"], found.summary["bops"]) == (1234, 6640)
    assert "top1" not in found.summary and "ptq_top1" not in found.summary
    assert found.metrics["val/top1"].step_metric == "epoch"
    assert (found.metrics["val/top1"].summary.max, found.metrics["val/top1"].summary.last) == (True, True)
    assert found.metrics["train/*"].step_metric == "step" and found.metrics["bits/*"].step_metric == "layer"

    teacher, mine = found.artifacts["teacher-56"], found.artifacts["student"]
    assert teacher.use_after_commit and not mine.use_after_commit
    assert {teacher.type, mine.type} == {"model"}
    (entry,) = teacher.manifest.contents
    assert (entry.path, entry.size) == ("model.safetensors", 7)
    assert Path(entry.local_path) == weights, "no copy"
    assert '"top1":90' in mine.metadata.replace(" ", "")
    table = found.artifacts[f"run-{found.id}-allocation"].manifest.contents[0]
    assert Path(table.local_path).is_relative_to(folder), "what waits for its upload lies in the run's folder"
    assert '"conv1"' in Path(table.local_path).read_text()
    assert "WANDB_DATA_DIR" not in os.environ


def test_last_part_of_a_resumed_offline_run_is_complete(wandb_client: None, tmp_path: Path) -> None:
    """The part of the process before lacks what W&B had in memory, and holds rows that were undone."""
    file = JsonlLogger(folder=tmp_path)
    killed = WandbRun(folder=tmp_path)
    killed.replay([])
    for step in range(3):
        file.log_metrics({"val/top1": 50.0 + step, "epoch": step}, step=step)
        killed.log_metrics({"val/top1": 50.0 + step, "epoch": step}, step=step)
    close([killed], error=RuntimeError("killed"))
    before = parts(tmp_path)
    time.sleep(1.0)  # a part is named by the second in which it begins

    resumed = WandbRun(folder=tmp_path)
    resumed.replay(read_metrics(file.path)[0][:2])  # the row of step 2 is undone: the resume point is of before
    resumed.replay(read_metrics(file.path)[0])  # a later stage replays nothing
    for step in range(2, 4):
        resumed.log_metrics({"val/top1": 40.0 + step, "epoch": step}, step=step)
    close([resumed])
    found = offline(tmp_path)
    assert parts(tmp_path) != before
    assert metrics(found.rows("val/top1"), "val/top1") == [(0, 50.0), (1, 51.0), (2, 42.0), (3, 43.0)]
    assert (found.summary["best_val_top1"], found.id) == (51.0, run_id(tmp_path))


@pytest.mark.parametrize(
    ("error", "status", "exit_code", "preempting"),
    [
        (None, None, 0, False),
        (RuntimeError("no"), "failed", 1, False),
        (RunInterruptedError(signum=15, resume_point=None), "interrupted", 1, True),
        (SystemExit(), "stopped", 0, False),
    ],
    ids=["ended", "failed", "sigterm", "stopped by a scheduler"],
)
def test_exit_status_of_a_run_is_recorded(
    wandb_client: None,
    tmp_path: Path,
    error: BaseException | None,
    status: str | None,
    exit_code: int,
    preempting: bool,
) -> None:
    run = WandbRun(folder=tmp_path)
    rows_of(run, range(1))
    close([run], error=error)
    found = offline(tmp_path)
    assert (found.summary.get("status"), found.exit_code, found.preempting) == (status, exit_code, preempting)


def test_run_without_logged_rows_leaves_no_files(wandb_client: None, tmp_path: Path) -> None:
    close([WandbRun(folder=tmp_path)])
    assert not list(tmp_path.glob("*"))


def test_two_runs_of_one_process(wandb_client: None, tmp_path: Path) -> None:
    """As trials in a warm worker, the second begun before the first has ended."""
    first, second = WandbRun(folder=tmp_path / "1"), WandbRun(folder=tmp_path / "2")
    for number, run in enumerate((first, second)):
        rows_of(run, range(number + 1))
    close([first, second])
    assert [len(offline(tmp_path / n).rows("val/top1")) for n in "12"] == [1, 2]
    assert "WANDB_MODE" not in os.environ, "Lightning's logger leaves its process offline"


def test_disabled_wandb_writes_no_files(wandb_client: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    run = WandbRun(folder=tmp_path)
    rows_of(run, range(2))
    close([run])
    assert not list(tmp_path.glob("*"))


def test_server_gets_all_rows_tables_and_files(wandb_server: WandbServer, tmp_path: Path) -> None:
    weights, student = tmp_path / "teacher.bin", tmp_path / "student.bin"
    weights.write_bytes(b"teacher")
    student.write_bytes(b"student!")
    for number in range(2):  # two trials with one teacher
        run = WandbRun(folder=tmp_path / str(number), project="tests", group="sweep", job_type="trial")
        run.log_layers(LAYERS)
        rows_of(run, range(3))
        run.summarize({"size_bytes": 1234})
        run.use_files({"w": weights}, name="teacher", kind="model")
        run.keep_files({"s": student}, name=f"student-{number}", kind="model", about={"top1": 90.0})
        close([run])
    state = wandb_server.state()
    assert state["unknown"] == []
    ids = [run_id(tmp_path / str(number)) for number in range(2)]
    assert list(state["runs"]) == ids
    for run_state in state["runs"].values():
        assert (run_state["project"], run_state["group"], run_state["job_type"]) == ("tests", "sweep", "trial")
        assert run_state["exit"] == 0
        assert metrics(run_state["history"], "val/top1") == [(0, 90.0), (10, 89.0), (20, 88.0)]
        assert run_state["summary"]["val/top1"] == {"max": 90, "last": 88}
        assert (run_state["summary"]["size_bytes"], run_state["summary"]["best_val_top1"]) == (1234, 90)
        assert run_state["summary"]["allocation"]["_type"] == "table-file"
    (teacher,) = state["artifacts"]["teacher"]
    assert (teacher["used_by"], teacher["made_by"], teacher["files"], teacher["state"]) == (
        ids, None, {"w": 7}, "COMMITTED",
    )  # fmt: skip
    for number in range(2):
        (made,) = state["artifacts"][f"student-{number}"]
        assert (made["made_by"], made["files"]) == (ids[number], {"s": 8})
        assert made["metadata"] == {"top1": 90}


def test_resumed_run_continues_at_the_server(wandb_server: WandbServer, tmp_path: Path) -> None:
    first = WandbRun(folder=tmp_path)
    first.log_layers(LAYERS)
    rows_of(first, range(3))
    close([first], error=RunInterruptedError(signum=15, resume_point=None))
    assert the_run(wandb_server)["preempting"]
    # The resume point is of before the last rows; one row that metrics.jsonl has never reached the server.
    again = WandbRun(folder=tmp_path)
    again.replay([{"step": 25, "epoch": 2, "time": 0.0, "split": "train", "total": 7.0}])
    again.log_layers(LAYERS)
    rows_of(again, range(1, 5))
    close([again])
    run = the_run(wandb_server)
    assert (25, 7.0) in metrics(run["history"], "train/total")
    # Rows that the server has are not sent again, but those of the step that it had last, some of which it may lack.
    assert metrics(run["history"], "val/top1") == [(0, 90), (10, 89), (20, 88), (20, 88), (30, 87), (40, 86)]
    assert sum("bits/weight" in row for row in run["history"]) == len(LAYERS)
    assert run["summary"]["best_val_top1"] == 90, "also of the rows before"
    assert (run["summary"]["val_top1"], run["exit"]) == (86, 0)


def test_run_continues_when_the_server_dies(
    wandb_server: WandbServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Logging goes on as if nothing had happened, one line says so at the end, and a later sync has everything."""
    student = tmp_path / "student.bin"
    student.write_bytes(b"student")
    run = WandbRun(folder=tmp_path / "run", project="tests", host_timeout_s=1.0, finish_timeout_s=2.0)
    rows_of(run, range(3))
    assert wandb_server.state()["runs"], "it was online"
    wandb_server.kill()
    rows_of(run, range(3, 60))
    run.summarize({"size_bytes": 1234})
    run.keep_files({"s": student}, name="student", kind="model")
    close([run])
    (line,) = told(caplog)
    (place,), (rest,) = (tmp_path / "run" / "wandb").glob("run-*"), parts(tmp_path / "run")
    assert "does not answer" in line and line.endswith(f"wandb sync --include-online {place} {rest}")

    later = WandbRun(folder=tmp_path / "later", host_timeout_s=1.0)  # the next trial of the same worker
    rows_of(later, range(1))
    close([later])
    assert len(offline(tmp_path / "later").rows("val/top1")) == 1

    server = WandbServer()
    try:
        sync(server, place, rest)
        run_state = the_run(server)
        assert [step for step, _ in metrics(run_state["history"], "val/top1")] == [10 * step for step in range(60)]
        assert run_state["summary"]["size_bytes"] == 1234
        assert server.state()["artifacts"]["student"][0]["made_by"] == run_id(tmp_path / "run")
    finally:
        server.kill()


def test_run_does_not_wait_for_a_server_that_hangs(
    wandb_server: WandbServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wandb_server.freeze()
    with caplog.at_level(logging.INFO, logger="qtrain"):
        run = WandbRun(folder=tmp_path, host_timeout_s=0.3)
        rows_of(run, range(2))
        close([run])
    (line,) = told(caplog)
    assert "timed out" in line
    assert len(offline(tmp_path).rows("val/top1")) == 2


def test_an_offline_run_is_synced_later(wandb_client: None, tmp_path: Path) -> None:
    weights = tmp_path / "teacher.bin"
    weights.write_bytes(b"teacher")
    run = WandbRun(folder=tmp_path / "run", project="tests", group="sweep", job_type="trial", config={"seed": 3})
    run.log_layers(LAYERS)
    rows_of(run, range(4))
    run.use_files({"w": weights}, name="teacher", kind="model")
    close([run])
    server = WandbServer()
    try:
        sync(server, *parts(tmp_path / "run"))
        found = the_run(server)
        assert (found["project"], found["group"], found["job_type"]) == ("tests", "sweep", "trial")
        assert found["config"]["seed"] == {"value": 3}
        assert metrics(found["history"], "val/top1") == [(10 * step, 90.0 - step) for step in range(4)]
        assert found["summary"]["val/top1"] == {"max": 90, "last": 87}
        artifacts = server.state()["artifacts"]
        assert artifacts["teacher"][0]["used_by"] == [run_id(tmp_path / "run")]
        assert artifacts[f"run-{run_id(tmp_path / 'run')}-allocation"][0]["files"]
    finally:
        server.kill()


def test_failing_client_does_not_end_the_training(
    wandb_client: None, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = WandbRun(folder=tmp_path)
    rows_of(run, range(1))
    assert run._run is not None

    def fail(row: dict[str, Any]) -> None:
        raise BrokenPipeError("the service is gone")

    monkeypatch.setattr(run._run, "log", fail)
    rows_of(run, range(1, 3))
    run.keep_files({"x": tmp_path / "is not there"}, name="x", kind="model")
    close([run])
    (line,) = [line for line in told(caplog) if "offline" not in line]
    assert "BrokenPipeError: the service is gone" in line and "metrics.jsonl" in line
    assert offline(tmp_path).exit_code == 0


def test_artifact_and_knob_names_are_adapted_to_wandb() -> None:
    assert artifact_name("cifar10/resnet20 W4A4+x") == "cifar10-resnet20-W4A4-x"
    assert len(artifact_name("x" * 300)) == 128
    assert named_knobs({"widths.layer1.0": 4, "lr": None}) == {"widths_layer1_0": 4}


def test_wandb_run_refuses_an_unknown_mode(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="WandbRun: mode must be one of online, offline, disabled, got 'ofline'"):
        WandbRun(folder=tmp_path, mode="ofline")


def sync(server: WandbServer, *places: Path) -> None:
    """``wandb sync``, as a user types it."""
    subprocess.run(
        [sys.executable, "-m", "wandb", "sync", "--include-online", *map(str, places)],
        cwd=places[0].parent,  # where the client writes what it did
        env={**os.environ, **server.environment},
        check=True,
        capture_output=True,
        timeout=120,
    )
