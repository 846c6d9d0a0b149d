"""Trials on disk: whole lines, the last of an id, and what a killed writer leaves."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from qtrain.settings.run_files import TRIALS
from qtrain.sweep.trial import Trial, append_trial, read_trials

TRIAL = Trial(
    id="t1",
    key="0123abcd",
    status="finished",
    overrides=["objective=soft", "optimizer.lr=0.001"],
    knobs={"objective": "soft", "lr": 1e-3, "widths/layer1.0": 3},
    metrics={"top1": 87.5, "size_bytes": 71234.0},
    layer_bits={"conv1": [8, 8], "layer1.0.conv1": [3, 3]},
    epochs=4.0,
    train_s=12.5,
    overhead_s=0.25,
    started=1.5,
    ended=14.25,
    host="here",
    threads=1,
)


def test_a_trial_survives_the_file(tmp_path: Path) -> None:
    append_trial(tmp_path / "new", TRIAL)
    assert read_trials(tmp_path / "new") == [TRIAL]


def test_no_file_is_no_trials(tmp_path: Path) -> None:
    assert read_trials(tmp_path) == []


def test_the_last_line_of_an_id_counts_and_the_first_gives_its_place(tmp_path: Path) -> None:
    again = Trial(id="t1", key="0123abcd", status="failed", reason="loss was not finite")
    other = Trial(id="t2", key="4567", status="duplicate", of="t1")
    for trial in (TRIAL, other, again):
        append_trial(tmp_path, trial)
    assert read_trials(tmp_path) == [again, other]


@pytest.mark.parametrize("cut", [1, 20, 200])
def test_an_unfinished_line_is_ignored_and_does_not_spoil_the_next(
    tmp_path: Path, cut: int, caplog: pytest.LogCaptureFixture
) -> None:
    append_trial(tmp_path, TRIAL)
    path = tmp_path / TRIALS
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:-cut] if cut > 1 else whole + whole[: len(whole) // 2])
    assert read_trials(tmp_path) == [TRIAL]
    assert "trials.jsonl:2" in caplog.text
    later = Trial(id="t2", key="4567", status="stopped", reason="asha")
    append_trial(tmp_path, later)
    assert read_trials(tmp_path) == [TRIAL, later]


def test_each_line_is_strict_json_without_what_is_not_finite(tmp_path: Path) -> None:
    append_trial(tmp_path, Trial(id="t", key="k", status="failed", metrics={"loss": math.nan, "top1": 10.0}))

    def refuse(word: str) -> None:
        raise AssertionError(word)

    (line,) = (tmp_path / TRIALS).read_text(encoding="utf-8").splitlines()
    assert json.loads(line, parse_constant=refuse)["metrics"] == {"top1": 10.0}


def test_an_unknown_status_is_refused() -> None:
    with pytest.raises(ValueError, match="status must be one of finished, stopped, failed, duplicate, got 'done'"):
        Trial(id="t", key="k", status="done")  # type: ignore[arg-type]
