"""What the comparison of two commits sees and what it overlooks: hand-made run folders, and renamed things."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.helpers.script import load_script


@pytest.fixture(scope="module")
def golden() -> ModuleType:
    return load_script("golden")


def leave(
    folder: Path,
    *,
    weight: float = 1.0,
    loss: float | None = 0.5,
    time: float = 0.0,
    key: str = "abc",
    student: str = "student.safetensors",
    tensor: str = "fc.weight_quantizer.scale",
    column: str = "total",
    clock: str = "time",
) -> Path:
    """What a run and a sweep of one trial leave, in small."""
    run = folder / "adhoc" / "run"
    trial = folder / "adhoc" / "sweep" / "trials" / key
    for place in (run, trial):
        place.mkdir(parents=True)
        save_file({"fc.weight": torch.tensor([0.0, weight]), tensor: torch.ones(1)}, place / student)
        rows = [{"step": step, clock: time, "split": "train", column: loss, "images_per_s": time} for step in (1, 2)]
        (place / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = {"name": "run", "top1": 50.0, "wall_s": time, "layers": [{"name": "fc", "bops": 64}]}
    (run / "summary.json").write_text(json.dumps(summary))
    ended = {"id": "0001", "key": key, "figures": {"top1": 50.0}, "train_s": time, "started": time}
    (folder / "adhoc" / "sweep" / "trials.jsonl").write_text(json.dumps(ended) + "\n")
    return folder


@pytest.fixture
def compared(golden: ModuleType, tmp_path: Path) -> Callable[..., Any]:
    """Compares a run with one in which something is another."""

    def compare(**changes: Any) -> Any:
        before, after = leave(tmp_path / "before"), leave(tmp_path / "after", **changes)
        return golden.compare(*(golden.collect(folder, golden.Spelling(lacks=())) for folder in (before, after)))

    return compare


def test_equal_runs_are_equal(compared: Callable[..., Any]) -> None:
    found = compared()
    assert found.same and found.first == ""
    assert found.equal == found.total == (4, 4, 3), "tensors, rows, and top1, bops, the trial's top1"


def test_the_clock_and_the_hash_of_a_trial_may_differ(compared: Callable[..., Any]) -> None:
    found = compared(time=7.0, key="def")
    assert found.same and found.equal == found.total


def test_a_tensor_that_differs_in_one_bit_is_named(compared: Callable[..., Any]) -> None:
    found = compared(weight=1.0 + 2**-23)
    assert not found.same and found.equal == (2, 4, 3)
    assert found.first.startswith("adhoc/run/student.safetensors: fc.weight: ")


@pytest.mark.parametrize("loss", [0.5 + 2**-53, None])
def test_a_metric_that_differs_is_named(compared: Callable[..., Any], loss: float | None) -> None:
    found = compared(loss=loss)
    assert not found.same and found.equal == (4, 0, 3)
    assert found.first == f"adhoc/run/metrics.jsonl:1: total: 0.5 before, {loss} after"


def test_a_name_on_one_side_only_is_a_difference(compared: Callable[..., Any]) -> None:
    found = compared(column="loss")
    assert not found.same and found.first == "adhoc/run/metrics.jsonl:1: total: only before"


def test_nothing_at_all_is_a_difference(golden: ModuleType, tmp_path: Path) -> None:
    found = golden.compare(*(golden.collect(tmp_path, golden.Spelling(lacks=())) for _ in range(2)))
    assert not found.same and found.first.startswith("nothing to compare")


def test_a_run_that_failed_is_a_difference(golden: ModuleType) -> None:
    found = golden.compare(golden.Found(), golden.Found(failure="after: unknown key"))
    assert not found.same and found.first == "failed: after: unknown key"


def test_what_a_commit_renamed_is_compared_under_its_new_name(golden: ModuleType, tmp_path: Path) -> None:
    renamed = golden.Renamed(
        since="conf/config.yaml: range_lr",
        overrides={"fit.scale_lr": "fit.range_lr", "quantize.bits": "bits", "epochs": "rounds"},
        metrics={"total": "loss", "time": "clock"},
        tensors={"weight_quantizer": "quantizers.weight"},
        files={"student.safetensors": "model.safetensors"},
    )
    old, new = tmp_path / "old", tmp_path / "new"
    for checkout, key in ((old, "scale_lr"), (new, "range_lr")):
        (checkout / "conf").mkdir(parents=True)
        (checkout / "conf" / "config.yaml").write_text(f"fit: {{{key}: 0.1}}")
    before, after = (golden.Spelling.of(checkout, [renamed]) for checkout in (old, new))
    typed = "fit.scale_lr=0.1 +a@quantize.bits.weight=b fit.epochs=2 variants={x:['quantize.bits=4','epochs=3']}"
    assert before.typed(typed) == typed
    assert after.typed(typed) == "fit.range_lr=0.1 +a@bits.weight=b fit.epochs=2 variants={x:['bits=4','rounds=3']}"
    assert before.newest("metrics", "total") == after.newest("metrics", "loss") == "loss"

    one = golden.collect(leave(tmp_path / "before"), before)
    names = {"student": "model.safetensors", "tensor": "fc.quantizers.weight.scale", "column": "loss", "clock": "clock"}
    other = golden.collect(leave(tmp_path / "after", **names, time=3.0), after)
    assert golden.compare(one, other).same


def test_a_run_that_ended_is_not_repeated(golden: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def ends(self: Any, overrides: str, folder: Path, log: Path) -> bool:
        asked.append(overrides)
        leave(folder / "out")
        return True

    monkeypatch.setattr(golden.Side, "_ends_well", ends)
    side = golden.Side(tmp_path, tmp_path / "side", golden.Spelling(lacks=()))
    run = golden.Run("small", ("data.root=$IMAGES   model.weights=$OUT/x",))
    first, second = (side.leaves(run, tmp_path / "images") for _ in range(2))
    assert asked == [f"data.root={tmp_path}/images model.weights={tmp_path}/side/small/out/x"]
    assert first == second and golden.compare(first, second).same


def test_every_run_has_its_own_name(golden: ModuleType) -> None:
    names = [run.name for run in golden.RUNS]
    assert len(set(names)) == len(names)
