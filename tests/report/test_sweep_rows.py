"""The rows of a sweep in a results file: which there are, and that a rerun adds no more."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from qtrain.pipeline.results import append_row, read_results
from qtrain.report.sweep_rows import append_sweep_rows
from qtrain.sweep.sweep_results import SweepResults, read_sweep
from qtrain.sweep.trial import append_trial


@pytest.fixture
def tested(sweep_folder: Path) -> SweepResults:
    """The sweep of six; the two of its front and the beaten one were evaluated on test images."""
    config = yaml.safe_load((sweep_folder / "sweep.yaml").read_text())
    (sweep_folder / "sweep.yaml").write_text(yaml.safe_dump({**config, "seed": 0}, sort_keys=False))
    for trial in read_sweep(sweep_folder).trials[:3]:
        row = {"config_hash": trial.key, "name": trial.key, "task": "train", "size_bytes": trial.metrics["size_bytes"]}
        append_row(sweep_folder / "trials" / trial.key / "results.csv", row)
        append_trial(sweep_folder, replace(trial, metrics={**trial.metrics, "test_top1": trial.metrics["top1"] - 1}))
    return read_sweep(sweep_folder)


def test_sweep_leaves_its_front_its_starts_and_what_it_spent(tested: SweepResults, tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    append_sweep_rows(path, tested, starts={"0003"}, config_hash="of the sweep")
    *models, spent = read_results(path)
    # The front is given by accuracy and size; the third trial is beaten, and there because the sweep began with it.
    assert [(row["name"], row["point"], row["start"], row["top1"], row["val_top1"]) for row in models] == [
        ("0001", "1", "false", "95.5", "96.5"),
        ("0002", "2", "false", "89.25", "90.25"),
        ("0003", "", "true", "87", "88"),
    ]
    assert {row["task"] for row in models} == {"sweep"} and models[0]["size_bytes"] == "8000"
    assert (spent["name"], spent["config_hash"], spent["top1"]) == ("sweep", "of the sweep", "")
    append_sweep_rows(tmp_path / "other.csv", tested, starts=(), config_hash="of the sweep")
    assert [row["name"] for row in read_results(tmp_path / "other.csv")] == ["0001", "0002", "sweep"]


def test_rerun_adds_no_row_and_keeps_those_of_other_runs(tested: SweepResults, tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    # The same run outside of the sweep: a row without a sweep.
    append_row(path, {"config_hash": tested.trials[0].key, "name": "0001"})
    append_sweep_rows(path, tested, starts=(), config_hash="of the sweep")
    once = path.read_text()
    append_sweep_rows(path, tested, starts=(), config_hash="of the sweep")
    assert path.read_text() == once
    assert [row["name"] for row in read_results(path)] == ["0001", "0001", "0002", "sweep"]
