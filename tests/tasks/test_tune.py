"""The tuner on few digits: what it leaves, that it goes on where it was stopped, and that test images stay unseen."""

from __future__ import annotations

import csv
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from qtrain.config.compose import compose
from qtrain.data.base import VisionData
from qtrain.tasks import train, tune
from qtrain.tasks.variants import run_task
from qtrain.training.module import QATModule
from qtrain.utils.errors import ConfigError, RunInterruptedError

TINY = """
    task=tune trainer=cpu data.max_train=200 data.max_test=20 model=cifar_resnet8 model.width=0.25
    teacher=cifar_resnet20 teacher.model.width=0.25 objective=soft full_precision.epochs=1 fit.reestimate_bn=1
    fit.health_every_steps=0 quantize.calibration_batches=1 optimizer.lr=0.01
    tune.temperatures=[1,4] tune.weights=[0.5] tune.rungs=2 tune.val_fraction=0.2
""".split()


def command(folder: Path, *more: str) -> dict[str, Any]:
    overrides = [*TINY, f"output={folder / 'outputs'}", f"full_precision.folder={folder / 'cache'}", *more]
    return run_task(compose(overrides), overrides)


def without_width(more: list[str]) -> list[str]:
    """``TINY``, without the teacher's option where ``more`` takes the teacher away."""
    return [override for override in TINY if "teacher=none" not in more or not override.startswith("teacher.model")]


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "outputs" / "adhoc" / "tune" / "tune.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("tune")
    return folder, command(folder, "tune.widths=[2]")


def test_the_better_half_and_the_student_alone_go_on(searched: tuple[Path, dict[str, Any]]) -> None:
    folder, metrics = searched
    found = rows(folder)
    # Two temperatures, one weight, and the student alone.
    assert [(row["w_bits"], row["epochs"], row["distill"]) for row in found] == [
        ("2", "1", "none"), ("2", "1", "soft"), ("2", "1", "soft"), ("2", "2", "soft"), ("2", "2", "none")
    ]  # fmt: skip
    assert len({row["config_hash"] for row in found}) == 5
    first = min(found[1:3], key=lambda row: (-float(row["val_top1"]), float(row["val_loss"])))
    assert found[3]["temperature"] == first["temperature"]
    winner = min(found[3:], key=lambda row: (-float(row["val_top1"]), float(row["val_loss"])))
    assert metrics["w2a2/val_top1"] == pytest.approx(float(winner["val_top1"]))
    assert metrics["w2a2/val_top1_alone"] == pytest.approx(float(found[4]["val_top1"]))
    assert str(metrics["w2a2/temperature"] or "") == winner["temperature"]
    assert all(row["top1"] == "" and "40 validation images" in row["notes"] for row in found)


def test_what_is_kept_can_be_pasted(searched: tuple[Path, dict[str, Any]]) -> None:
    folder, metrics = searched
    variants = yaml.safe_load((folder / "outputs" / "adhoc" / "tune" / "tuned.yaml").read_text())["variants"]
    ((label, overrides),) = variants.items()
    cfg = compose([*without_width(overrides), "task=train", *overrides])
    assert f"w{cfg.quantize.bits.weight}a{cfg.quantize.bits.input}" == label
    if metrics[f"{label}/temperature"] is None:
        assert cfg.teacher.model is None
    else:
        assert cfg.distill.temperature == metrics[f"{label}/temperature"]
        assert cfg.distill.soft == metrics[f"{label}/weight"] == 1 - cfg.distill.hard


def test_candidates_leave_no_folders_and_the_same_command_repeats_none(
    searched: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, metrics = searched
    assert not list((folder / "outputs").rglob("*.safetensors"))
    before = rows(folder)
    monkeypatch.setattr(train, "run", lambda cfg: pytest.fail("a finished candidate was repeated"))
    assert command(folder, "tune.widths=[2]") == metrics
    assert rows(folder) == before
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split() == ["Bits", "Temperature", "Weight", "1", "epoch,", "%", "2", "epochs,", "%"]
    assert sum(line.startswith("w2a2 ") for line in shown) == 3
    assert any(line.startswith("w2a2: quantize.bits.weight=2 quantize.bits.input=2 ") for line in shown)


def test_an_interrupted_search_ends_as_one_that_was_not(
    searched: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped by a signal in the middle of a candidate of the second rung, whose first epoch was over."""
    whole, step = train.run, QATModule.training_step
    started = 0

    def counted(cfg: Any) -> dict[str, Any]:
        nonlocal started
        started += 1
        return whole(cfg)

    def stopped(module: QATModule, batch: Any, batch_idx: int) -> Any:
        if started == 4 and module.current_epoch == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(module, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(train, "run", counted)
        patch.setattr(QATModule, "training_step", stopped)
        with pytest.raises(RunInterruptedError):
            command(tmp_path, "tune.widths=[2]")
    assert len(rows(tmp_path)) == 3
    assert list((tmp_path / "outputs").rglob("candidates/*/checkpoints/*.ckpt"))
    metrics = command(tmp_path, "tune.widths=[2]")
    scores = [[(row["val_top1"], row["val_loss"]) for row in rows(folder)] for folder in (tmp_path, searched[0])]
    assert scores[0] == scores[1] and metrics == searched[1]


def test_test_images_are_never_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VisionData, "test_dataloader", lambda self: pytest.fail("test images"))
    metrics = command(tmp_path, "tune.rungs=1", "tune.temperatures=[2]", "quantize.bits.input=8")
    assert {key.split("/")[0] for key in metrics} == {"w4a8"}, "the config's own widths"


def test_a_candidate_is_the_run_that_its_overrides_make() -> None:
    cfg = compose(TINY)
    for candidate in (tune.Candidate(), tune.Candidate(4.0, 0.7)):
        own = tune._of(cfg, candidate, epochs=3)
        more = ["task=train", "logger=none", "fit.epochs=3", "fit.final_test=false", "data.val_fraction=0.2"]
        written = compose([*without_width(candidate.overrides), *candidate.overrides, *more])
        for key in ("objective", "teacher", "fit", "data", "quantize", "optimizer", "model"):
            assert train.run_folder.plain_config(own)[key] == train.run_folder.plain_config(written)[key], key


def test_there_must_be_a_teacher(tmp_path: Path) -> None:
    overrides = ["task=tune", "teacher=none", "objective=hard", f"output={tmp_path}"]
    with pytest.raises(ConfigError, match="tune: there is no teacher to learn from; name one"):
        run_task(compose(overrides), overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stages=progressive"], "tune: searches for a single fit, and this experiment has stages; add stages=none"),
        (["objective=hard"], "tune: the objective reads neither distill.temperature nor distill.soft"),
        (["tune.temperatures=[0]"], "tune.temperatures: must be a list of numbers above 0, got [0]"),
        (["tune.temperatures=[]"], "tune.temperatures: must be a list"),
        (["tune.weights=[0.5,1.5]"], "tune.weights: must be a list of numbers in (0, 1]"),
        (["tune.keep=1.0"], "tune.keep: must be in (0, 1), got 1.0"),
        (["tune.rungs=0"], "tune.rungs: must be at least 1, got 0"),
        (["tune.val_fraction=0"], "tune.val_fraction: must be in (0, 1)"),
    ],
)
def test_mistakes_are_one_line(overrides: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        command(tmp_path, *overrides)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "outputs").exists()
