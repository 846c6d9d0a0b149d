"""The whole of a run, from config to summary, on few digits with tiny models; and a second look at what it left."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from qtrain.config.compose import AD_HOC, compose
from qtrain.pipeline.summary import FINISHED, read_summary
from qtrain.run_task import run_task, selected
from qtrain.settings.run_files import STUDENT
from qtrain.utils.bit_text import from_text
from qtrain.utils.errors import ConfigError
from tests.helpers.latent import latent_state

TINY = """
    trainer=cpu data.max_train=640 data.max_test=100 model=cifar_resnet8 model.width=0.5 fit.epochs=1
    full_precision.epochs=3 fit.reestimate_bn=2 quantize.calibration_batches=2 fit.log_every_steps=1
    fit.health_every_steps=2 quantize.bits.weight=8 quantize.bits.input=8 quantize.weight.init=range
    quantize.input.init=range optimizer.lr=0.01
""".split()
DISTILLED = """
    teacher=cifar_resnet20 teacher.model.width=0.5 objective=soft_hint distill.student_layers=[layer2]
    distill.teacher_layers=[layer2]
""".split()


def run(folder: Path, *more: str) -> dict[str, Any]:
    """One command with its outputs and its cache below ``folder``."""
    overrides = [*TINY, f"output={folder / 'outputs'}", f"full_precision.folder={folder / 'cache'}", *more]
    return run_task(compose(overrides), overrides)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of a first, distilled run, and what it returned. No test below changes the run itself."""
    folder = tmp_path_factory.mktemp("first")
    return folder, run(folder, *DISTILLED)


@pytest.fixture
def run_dir(first: tuple[Path, dict[str, Any]]) -> Path:
    (folder,) = (path.parent for path in (first[0] / "outputs" / AD_HOC).glob(f"*/{STUDENT}"))
    return folder


def files(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*") if p.is_file()}


def test_a_run_leaves_its_files(first: tuple[Path, dict[str, Any]], run_dir: Path) -> None:
    assert {"config.yaml", "metrics.jsonl", "results.csv", "student.safetensors", "summary.json"} <= {
        path.name for path in run_dir.iterdir()
    }
    assert not list(first[0].rglob("*.partial"))
    assert run_dir.name == "w8a8-distill"


def test_the_summary_agrees_with_what_the_task_returned(first: tuple[Path, dict[str, Any]], run_dir: Path) -> None:
    summary = json.loads((run_dir / "summary.json").read_text())
    for name in ("top1", "fp_top1", "ptq_top1"):
        assert summary[name] == pytest.approx(first[1][name])
        assert 0 <= summary[name] <= 100
    for name, accuracy in (("right", "top1"), ("fp_right", "fp_top1")):
        right = from_text(summary[name])
        assert (len(right), 100 * right.mean()) == (summary["test_images"], pytest.approx(summary[accuracy]))
    assert summary["status"] == FINISHED
    assert summary["distill"] == "soft+hint"
    assert (summary["w_bits"], summary["a_bits"], summary["epochs"], summary["seed"]) == (8, 8, 1, 0)
    assert (summary["dataset"], summary["model"], summary["experiment"]) == ("digits", "cifar_resnet8", None)
    assert summary["compression"] == pytest.approx(summary["fp_size_bytes"] / summary["size_bytes"])
    assert 8 < summary["effective_bits"] < 12, "8 bits and a scale for each layer of few weights"
    assert summary["bops"] < summary["fp_bops"]
    assert len(summary["layers"]) == 8
    assert read_summary(run_dir / "summary.json").top1 == summary["top1"]


@pytest.mark.parametrize("own, steps", [([], 1), (DISTILLED, 10)], ids=["labels", "teacher"])
def test_images_without_labels_are_for_the_teacher(
    first: tuple[Path, dict[str, Any]], tmp_path: Path, own: list[str], steps: int
) -> None:
    """Of 640 images in batches of 64, one batch has labels; without a teacher, an epoch is that batch."""
    few = ["data.labeled=64", "full_precision.all_labels=true", "fit.final_test=false"]
    run(first[0], *few, *own, f"output={tmp_path}", "name=few")
    rows = [json.loads(line) for line in (tmp_path / AD_HOC / "few" / "metrics.jsonl").read_text().splitlines()]
    assert max(row["step"] for row in rows if row["split"] == "train") == steps
    assert all(math.isfinite(row.get("total", 0.0)) for row in rows)


def test_the_metrics_hold_every_step_and_term(run_dir: Path) -> None:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    training = [row for row in rows if row["split"] == "train" and "total" in row]
    assert [row["step"] for row in training] == list(range(1, 640 // 64 + 1))
    for row in training:
        expected = 0.5 * row["hard"] + 0.5 * row["soft"] + 1.0 * row["hint"]
        assert row["total"] == pytest.approx(expected, rel=1e-4)
    assert any("scale/conv1.weight" in row for row in rows)


def test_the_results_row_says_where_it_comes_from(run_dir: Path) -> None:
    with (run_dir / "results.csv").open() as file:
        (row,) = csv.DictReader(file)
    cfg = (run_dir / "config.yaml").read_text()
    assert "teacher" in cfg
    assert row["task"] == "train"
    assert row["torch"] == torch.__version__
    for column in ("date", "commit", "config_hash", "hardware", "step_ms", "wall_s", "top1"):
        assert row[column], column


def test_the_student_holds_no_teacher_and_no_regressor(run_dir: Path) -> None:
    saved = latent_state(run_dir)
    assert not [name for name in saved if name.startswith(("student.", "objective.", "teacher", "terms"))]
    quantizers = [name for name in saved if name.endswith("_quantizer.initialized")]
    assert len(quantizers) == 16
    assert all(bool(saved[name]) for name in quantizers)


def test_evaluating_the_runs_folder_reproduces_its_accuracy(
    first: tuple[Path, dict[str, Any]], run_dir: Path, tmp_path: Path
) -> None:
    for checkpoint in (run_dir, run_dir / STUDENT):
        metrics = run(tmp_path, "task=evaluate", f"checkpoint={checkpoint}", "model.width=0.25")
        assert metrics["top1"] == first[1]["top1"]


def test_a_finished_run_is_not_repeated(first: tuple[Path, dict[str, Any]], run_dir: Path) -> None:
    before = files(first[0])
    assert run(first[0], *DISTILLED) == pytest.approx(first[1])
    assert files(first[0]) == before


def test_another_config_in_the_same_folder_is_refused(first: tuple[Path, dict[str, Any]], run_dir: Path) -> None:
    before = files(first[0])
    with pytest.raises(ConfigError, match=r"^run_dir: .* holds a run of another config; choose another name="):
        run(first[0], *DISTILLED, f"name={run_dir.name}", "optimizer.lr=0.02")
    assert files(first[0]) == before


def test_a_second_run_finds_the_teacher_and_repeats_the_first_bit_for_bit(
    first: tuple[Path, dict[str, Any]], run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = sorted(path.name for path in (first[0] / "cache").iterdir())
    assert len(kept) == 2, "the student's full-precision weights and the teacher's"
    before = files(first[0] / "cache")
    with caplog.at_level("INFO", logger="qtrain"):
        again = run(first[0], *DISTILLED, "name=again")
    assert "full-precision cifar_resnet20: found" in caplog.text
    assert "no weights; training" not in caplog.text
    assert files(first[0] / "cache") == before
    assert again == pytest.approx(first[1])
    one, two = (latent_state(folder) for folder in (run_dir, run_dir.parent / "again"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name


def test_overwrite_runs_again_and_without_a_teacher_there_is_none(first: tuple[Path, dict[str, Any]]) -> None:
    run(first[0], "name=plain", "fit.final_test=false")
    folder = first[0] / "outputs" / AD_HOC / "plain"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["top1"] is None
    assert summary["status"] != FINISHED
    run(first[0], "name=plain", "overwrite=true")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["distill"] == "none"
    assert summary["status"] == FINISHED
    after = files(folder)
    run(first[0], "name=plain")
    assert files(folder) == after, "overwrite itself is no part of what identifies a run"


def test_full_precision_training_quantizes_nothing(tmp_path: Path) -> None:
    metrics = run(tmp_path, "quantize.enabled=false", "name=float")
    assert metrics["ptq_top1"] is None
    summary = json.loads((tmp_path / "outputs" / AD_HOC / "float" / "summary.json").read_text())
    assert (summary["w_bits"], summary["a_bits"], summary["quantizer"]) == (32, 32, None)
    assert summary["compression"] == pytest.approx(1.0)


def test_variants_run_one_after_the_other_and_end_in_a_report(first: tuple[Path, dict[str, Any]]) -> None:
    variants = "variants={few: ['quantize.bits.weight=2'], many: ['quantize.bits.weight=6']}"
    metrics = run(first[0], variants)
    assert {"few/top1", "many/top1"} <= set(metrics)
    for name in ("few", "many"):
        assert (first[0] / "outputs" / AD_HOC / name / "summary.json").is_file()
    assert (first[0] / "outputs" / AD_HOC / "report.html").is_file()


def test_some_of_the_variants_can_be_selected(first: tuple[Path, dict[str, Any]]) -> None:
    cfg = compose(["variants={one-w2: [], one-w4: [], two-w4: []}", "select=['*-w4']"])
    assert selected(cfg) == ["one-w4", "two-w4"]
    assert selected(compose(["variants={one: [], two: []}"])) == ["one", "two"]
    with pytest.raises(ConfigError, match=r"select: 'three' fits no variant; there are one, two"):
        selected(compose(["variants={one: [], two: []}", "select=[one,three]"]))
    (row,) = csv.DictReader((first[0] / "outputs" / AD_HOC / "few" / "results.csv").open())
    assert row["name"] == "few"


def test_an_objective_that_needs_a_teacher_says_so(first: tuple[Path, dict[str, Any]]) -> None:
    with pytest.raises(ConfigError, match="objective: a term compares with a teacher and there is none; name one"):
        run(first[0], "objective=soft", "name=orphan")
    assert run(first[0], "name=orphan")["top1"] is not None, "a run that never began does not hold its folder"


def test_evaluation_without_weights_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.weights: evaluate needs weights; give a file, or checkpoint="):
        run(tmp_path, "task=evaluate")
    with pytest.raises(
        ConfigError,
        match=r"checkpoint: there is no file .*; give a student.safetensors, or the folder of a finished run",
    ):
        run(tmp_path, "task=evaluate", f"checkpoint={tmp_path}")
