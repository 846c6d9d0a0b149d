"""The benchmark runs, divides what it says it divides, and its rows become a table. No assertion on time."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch

from qtrain.pipeline.results import read_results
from tests.helpers.script import load_script

ROOT = Path(__file__).resolve().parent.parent.parent
TINY = ["--batch", "4", "--rounds", "1", "--steps", "1", "--warmup", "0", "--device", "cpu", "--no-compile"]

RANDOM = ("model.weights=null", "distill.teacher_weights=null")
"""Weights do not matter here, and those that the environment names are of other networks."""


def _load() -> ModuleType:
    return load_script("bench_step")


script = _load()


def test_the_five_cases_become_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    csv = tmp_path / "bench.csv"
    small = ["model=cifar_resnet8", "teacher=cifar_resnet20", "model.width=0.25"]
    assert script.main([*TINY, "--results", str(csv), *small]) == 0
    rows = read_results(csv)
    assert [(r["case"], r["mode"], r["model"], r["w_bits"], r["distill"]) for r in rows] == [
        ("full precision", "eager", "cifar_resnet8", "32", "none"),
        ("student", "eager", "cifar_resnet8", "4", "none"),
        ("teacher forward", "eager", "cifar_resnet20", "32", "none"),
        ("student with teacher", "eager", "cifar_resnet8", "4", "soft"),
        ("student with cached teacher", "eager", "cifar_resnet8", "4", "soft"),
    ]
    assert all(r["task"] == "bench" and float(r["step_ms"]) > 0 and "batch=4" in r["notes"] for r in rows)
    assert [bool(r["ratio"]) for r in rows] == [False, True, False, True, True]
    printed = capsys.readouterr().out
    assert "of full precision" in printed and "of student + teacher forward" in printed
    assert " of student, saves " in printed.splitlines()[-1]
    assert [bool(r["saved_bytes"]) for r in rows] == [True, True, False, True, True], "a teacher saves nothing"
    full, student = (int(float(row["saved_bytes"])) for row in rows[:2])
    assert float(rows[1]["saved_ratio"]) == pytest.approx(student / full, rel=1e-4) and 1.2 < student / full < 1.7


def test_without_a_teacher_the_student_stands_beside_full_precision(tmp_path: Path) -> None:
    csv = tmp_path / "bench.csv"
    alone = ["teacher=none", "objective=hard", "model=timm", "model.name=test_resnet", "--size", "24"]
    assert script.main([*TINY, "--results", str(csv), *alone]) == 0
    rows = read_results(csv)
    assert [row["case"] for row in rows] == ["full precision", "student"]
    assert float(rows[1]["ratio"]) > 0 and "size=24" in rows[1]["notes"]


def test_a_step_trains_the_student_and_not_the_teacher() -> None:
    cfg = script.compose(
        [
            f"+experiment={script.EXPERIMENT}",
            "model=cifar_resnet8",
            "teacher=cifar_resnet20",
            "objective=soft_hint",
            *RANDOM,
        ]
    )
    image, target = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    setting = script.Setting(cfg, image, target, bf16=False, compiled=False)
    student = script.quantized(cfg, 32)
    teacher = script.frozen_teacher(setting, ["layer3"])
    objective = cfg.objective.build()
    objective.bind_({"layer3": (1, 64, 8, 8)}, {"layer3": (1, 64, 8, 8)})
    before = [[p.detach().clone() for p in model.parameters()] for model in (student, teacher.model, objective)]
    script.training_step(setting, student, objective, teacher).run()
    after = [list(model.parameters()) for model in (student, teacher.model, objective)]
    same = [all(torch.equal(b, a) for b, a in zip(*pair, strict=True)) for pair in zip(before, after, strict=True)]
    assert same == [False, True, False]


def test_a_step_with_a_cached_teacher_never_asks_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = script.compose([f"+experiment={script.EXPERIMENT}", "model=cifar_resnet8", "teacher=cifar_resnet20", *RANDOM])
    setting = script.Setting(cfg, torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3]), bf16=False, compiled=False)
    teacher = script.cached_teacher(setting, str(tmp_path))
    expected = teacher.answer(setting.batch, 0)[0]
    live = script.FrozenTeacher
    assert torch.equal(expected, live.answer(teacher._live, setting.batch, 0)[0])
    monkeypatch.delattr(live, "answer")
    script.training_step(setting, script.quantized(cfg, 32), cfg.objective.build(), teacher).run()
    assert torch.equal(teacher.answer(setting.batch, 0)[0], expected)


def test_hints_have_no_cached_case() -> None:
    cfg = script.compose(
        [
            f"+experiment={script.EXPERIMENT}",
            "model=cifar_resnet8",
            "teacher=cifar_resnet20",
            "objective=soft_hint",
            *RANDOM,
        ]
    )
    setting = script.Setting(cfg, torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3]), bf16=False, compiled=False)
    assert script.CACHED not in script.make_cases(setting)


def test_accumulated_batches_are_measured_with_weights_quantized_once_and_for_each(tmp_path: Path) -> None:
    results = tmp_path / "bench.csv"
    assert script.main([*TINY, "--accumulate", "2", "teacher=none", "objective=hard", "--results", str(results)]) == 0
    rows = read_results(results)
    assert [row["case"] for row in rows] == ["full precision", "student", script.EACH_BATCH]
    assert all("accumulated=2" in row["notes"] for row in rows)


def test_wrong_options_end_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main([*TINY, "fit.epoch=3"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "bench_step: error: unknown key 'fit.epoch'; did you mean 'fit.epochs'?"
    ]
    assert script.main([*TINY, "objective=hard"]) == 2
    assert "one without the other" in capsys.readouterr().err
    for wrong, line in (
        (["--rounds", "0"], "argument --rounds: must be at least 1"),
        (["--no-eager", "--no-compile"], "nothing to measure"),
    ):
        with pytest.raises(SystemExit, match="2"):
            script.main(wrong)
        assert line in capsys.readouterr().err
