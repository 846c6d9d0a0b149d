"""A sweep as one run in W&B: what its tables say, and which runs' models it names as its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qtrain.sweep.sweep_results import SweepResults
from qtrain.sweep.trial import Trial, append_trial, read_trials
from qtrain.sweep.wandb_sweep import log_sweep
from qtrain.tracking.wandb_client import run_id
from qtrain.tracking.wandb_run import WandbRun
from tests.helpers.wandb_records import read_run
from tests.helpers.wandb_server import WandbServer

OBJECTIVES = {"top1": "max", "size_bytes": "min"}
TRIALS = [
    Trial(id="a", key="ka", status="finished", metrics={"top1": 90.0, "size_bytes": 100.0}, knobs={"lr": 0.1}),
    Trial(id="b", key="kb", status="finished", metrics={"top1": 80.0, "size_bytes": 50.0}, knobs={"widths.fc": [2, 4]}),
    Trial(id="c", key="kc", status="finished", metrics={"top1": 70.0, "size_bytes": 60.0}),  # b is better and smaller
    Trial(id="d", key="kd", status="failed", reason="loss is not finite"),
    Trial(id="e", key="ka", status="duplicate", of="a"),
]


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    folder = tmp_path / "sweep"
    for trial in TRIALS:
        append_trial(folder, trial)
        if trial.status == "finished":
            (folder / "trials" / trial.key).mkdir(parents=True)
            (folder / "trials" / trial.key / "student.bin").write_bytes(trial.key.encode())
    (folder / "front").mkdir()
    for name in ("sweep.html", "pareto.csv", "sweep.yaml", "front/1.yaml"):
        (folder / name).write_text(name)
    return folder


def log(folder: Path) -> None:
    run = WandbRun(folder=folder, group="bits", job_type="sweep")

    def student(trial: Trial) -> tuple[str, Path]:
        return f"student-{trial.key}", folder / "trials" / trial.key / "student.bin"

    sweep = SweepResults(folder, {}, read_trials(folder), OBJECTIVES)  # type: ignore[arg-type]
    log_sweep(run, sweep, name="bits", student=student)
    run.finalize("success")


def test_tables_models_and_report(wandb_client: None, sweep: Path) -> None:
    log(sweep)
    (part,) = (sweep / "wandb").glob("offline-run-*")
    found = read_run(part)
    assert (found.group, found.job_type, found.exit_code) == ("bits", "sweep", 0)
    counts = {name: found.summary[name] for name in ("finished", "failed", "duplicate", "front")}
    assert counts == {"finished": 3, "failed": 1, "duplicate": 1, "front": 2}
    assert (found.summary["best/top1"], found.summary["best/size_bytes"]) == (90.0, 50.0)

    table = json.loads(Path(found.artifacts[f"run-{found.id}-trials"].manifest.contents[0].local_path).read_text())
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert [(row["id"], row["status"], row["of"]) for row in rows] == [(t.id, t.status, t.of) for t in TRIALS]
    assert rows[3]["reason"] == "loss is not finite" and rows[3]["top1"] is None
    assert (rows[0]["knob lr"], rows[1]["knob widths_fc"]) == (0.1, "[2, 4]")
    pareto = json.loads(Path(found.artifacts[f"run-{found.id}-pareto"].manifest.contents[0].local_path).read_text())
    assert [row[0] for row in pareto["data"]] == ["a", "b"]

    used = {name for name, artifact in found.artifacts.items() if artifact.use_after_commit}
    assert used == {"student-ka", "student-kb"}
    assert {entry.path for entry in found.artifacts["front-bits"].manifest.contents} == {"0-a.bin", "1-b.bin"}
    assert found.artifacts["sweep-bits"].type == "report"
    assert {entry.path for entry in found.artifacts["sweep-bits"].manifest.contents} == {
        "sweep.html", "pareto.csv", "sweep.yaml", "trials.jsonl", "front/1.yaml",
    }  # fmt: skip


def test_the_sweep_is_linked_to_the_trials_that_made_its_front(wandb_server: WandbServer, sweep: Path) -> None:
    file = sweep / "trials" / "ka" / "student.bin"
    trial = WandbRun(folder=file.parent, group="bits", job_type="trial")
    trial.keep_files({"student.bin": file}, name="student-ka", kind="model")
    trial.finalize("success")
    log(sweep)
    state = wandb_server.state()
    (version,) = state["artifacts"]["student-ka"]
    assert (version["made_by"], version["used_by"]) == (run_id(file.parent), [run_id(sweep)])
    assert state["artifacts"]["sweep-bits"][0]["made_by"] == run_id(sweep)
    assert state["unknown"] == []


def test_a_sweep_without_a_front(wandb_client: None, tmp_path: Path) -> None:
    append_trial(tmp_path, TRIALS[3])
    log(tmp_path)
    (part,) = (tmp_path / "wandb").glob("offline-run-*")
    found = read_run(part)
    assert (found.summary["failed"], found.summary["front"]) == (1, 0)
    assert "front-bits" not in found.artifacts
