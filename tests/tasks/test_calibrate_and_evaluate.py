"""`task=calibrate` makes a student, `task=evaluate` measures one; a folder belongs to one of their runs at a time."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qtrain.config.compose import compose
from qtrain.data.base import VisionData
from qtrain.models.cifar_resnet import cifar_resnet8
from qtrain.packed.header import read
from qtrain.pipeline import run_folder
from qtrain.pipeline.run_folder import Metrics, run_in_folder
from qtrain.pipeline.run_lock import only_run_in
from qtrain.run_task import run_task
from qtrain.settings.run_files import CONFIG, STUDENT
from qtrain.utils.errors import ConfigError

AD_HOC = Path("outputs") / "adhoc"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    torch.manual_seed(0)
    save_file(cifar_resnet8(num_classes=10, in_chans=1, width=0.25).state_dict(), path)
    return path


def run(folder: Path, weights: Path, *more: str) -> dict[str, Any]:
    return run_task(compose(overrides(folder, weights, *more)))


def overrides(folder: Path, weights: Path, *more: str) -> list[str]:
    return [
        "model=cifar_resnet8", "model.width=0.25", f"model.weights={weights}", "data.max_train=64", "data.max_test=50",
        "data.batch_size=32", "quantize.calibration_batches=1", f"output={folder / 'outputs'}", "logger=none", *more,
    ]  # fmt: skip


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open() as file:
        return list(csv.DictReader(file))


def test_calibrate_leaves_a_student_that_evaluate_measures_alike(weights: Path, tmp_path: Path) -> None:
    made = run(tmp_path, weights, "task=calibrate", "name=made")
    folder = tmp_path / AD_HOC / "made"
    header, _ = read(folder / STUDENT)
    assert {weight.bits for weight in header.weights} == {4, 8}
    (row,) = rows(folder)
    assert (row["task"], row["notes"], row["w_bits"], row["epochs"]) == ("calibrate", "calibrated only", "4", "0")
    for checkpoint in (folder, folder / STUDENT):
        assert run(tmp_path, weights, "task=evaluate", f"checkpoint={checkpoint}") == {"top1": made["top1"]}
    alone = tmp_path / "alone" / STUDENT
    alone.parent.mkdir()
    alone.write_bytes((folder / STUDENT).read_bytes())
    other = ["data.mean=[0.9]", "data.std=[0.1]"]  # a lone file's images are normalized as the student's were
    assert run(tmp_path, weights, "task=evaluate", f"checkpoint={alone}", *other) == {"top1": made["top1"]}


def test_calibrate_closes_with_advice_where_much_was_lost(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = {"fp_top1": 90.0, "top1": 10.0}
    monkeypatch.setattr("qtrain.tasks.calibrate.quantize_post_training", lambda _: lost)
    assert run(tmp_path, weights, "task=calibrate", "name=made") == lost
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("calibrated, the student has 10.00 %, 80.0 points less than in full precision")
    assert "rounding@quantize.rounding=brecq" in last


def test_training_closes_with_advice_about_where_it_began(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for calibrated, advised in ((10.0, True), (85.0, False)):
        metrics = {"fp_top1": 90.0, "top1": 89.0, "ptq_top1": calibrated}
        monkeypatch.setattr("qtrain.tasks.train.train", lambda _, metrics=metrics: metrics)
        assert run(tmp_path, weights, "name=made") == metrics
        out = capsys.readouterr().out
        assert ("calibrated only, before training, the student has 10.00 %, 80.0 points less" in out) == advised


def test_evaluate_measures_weights_in_full_precision_and_makes_no_student(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = run(tmp_path, weights, "task=calibrate", "name=made")
    capsys.readouterr()
    monkeypatch.setattr(VisionData, "calibration_batches", lambda *_: pytest.fail("evaluation calibrates nothing"))
    assert run(tmp_path, weights, "task=evaluate") == {"fp_top1": made["fp_top1"]}
    assert f"cifar_resnet8, full precision: {made['fp_top1']:.2f} %" in capsys.readouterr().out
    folder = tmp_path / AD_HOC / "evaluate"
    (row,) = rows(folder)
    assert (row["w_bits"], row["a_bits"], row["notes"]) == ("32", "32", "full precision")
    assert float(row["top1"]) == float(row["fp_top1"]) == pytest.approx(made["fp_top1"])
    assert not (folder / STUDENT).exists()


def test_calibrate_refuses_a_folder_that_another_run_holds(weights: Path, tmp_path: Path) -> None:
    folder = tmp_path / AD_HOC / "held"
    with only_run_in(folder), pytest.raises(ConfigError, match=r"run_dir: .*held is in use by"):
        run(tmp_path, weights, "task=calibrate", "name=held")
    assert not (folder / CONFIG).exists()


def test_finished_calibration_is_shown_without_the_lock(weights: Path, tmp_path: Path) -> None:
    made = run(tmp_path, weights, "task=calibrate", "name=made")
    folder = tmp_path / AD_HOC / "made"
    with only_run_in(folder):
        assert run(tmp_path, weights, "task=calibrate", "name=made") == made
    assert len(rows(folder)) == 1


def test_run_that_another_process_finished_before_the_lock_was_free_is_not_repeated(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = compose(overrides(tmp_path, weights, "task=calibrate", "name=made"))
    folder = tmp_path / AD_HOC / "made"

    @contextmanager
    def after_another_run(held: Path) -> Iterator[None]:
        monkeypatch.setattr(run_folder, "only_run_in", only_run_in)
        run_task(settings)
        with only_run_in(held):
            yield

    monkeypatch.setattr(run_folder, "only_run_in", after_another_run)
    metrics = run_in_folder(settings, lambda _: pytest.fail("the run is finished"), names=["top1"])
    assert metrics["top1"] is not None
    assert len(rows(folder)) == 1


def test_two_claims_of_one_folder_exclude_each_other(weights: Path, tmp_path: Path) -> None:
    settings = compose(overrides(tmp_path, weights, "task=calibrate", "name=made"))

    def claim_again(folder: Path) -> Metrics:
        with pytest.raises(ConfigError, match="is in use by"):
            run_in_folder(settings, lambda _: pytest.fail("the folder is in use"), names=["top1"])
        return {"top1": 1.0}

    assert run_in_folder(settings, claim_again, names=["top1"]) == {"top1": 1.0}
    assert run_in_folder(settings, lambda _: {"top1": 2.0}, names=["top1"]) == {"top1": 2.0}, "the lock is free again"
