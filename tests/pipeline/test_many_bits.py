"""A run of many bits, from its config to its file, and what does not go with it."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qtrain.config.compose import compose
from qtrain.packed.load import load_student
from qtrain.pipeline.many_bits import settings_by_width
from qtrain.pipeline.student_file import student_at
from qtrain.pipeline.summary import read_summary
from qtrain.run_task import run_task
from qtrain.settings.run_files import SUMMARY
from qtrain.training.callbacks import progress as progress_callback
from qtrain.utils.errors import ConfigError
from tests.helpers.latent import latent_state

TINY = """
    trainer=cpu data.max_train=512 data.max_test=100 data.val_fraction=0.1 model=cifar_resnet8 model.width=0.5
    fit.epochs=1 full_precision.epochs=2 fit.reestimate_bn=2 quantize.calibration_batches=2 fit.log_every_steps=1
    fit.health_every_steps=2 fit.checkpoint_every_steps=1 optimizer.lr=0.01
""".split()
MANY = "many_bits.widths=[4, 8, 2]"


def run(folder: Path, *more: str) -> dict[str, Any]:
    overrides = [*TINY, f"output={folder / 'outputs'}", f"full_precision.folder={folder / 'cache'}", *more]
    return run_task(compose(overrides), overrides)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("many")
    return folder, run(folder, MANY)


@pytest.fixture(scope="module")
def run_dir(first: tuple[Path, dict[str, Any]]) -> Path:
    (found,) = (first[0] / "outputs").glob("*/many4-8-2")
    return found


def test_each_width_is_evaluated(first: tuple[Path, dict[str, Any]], run_dir: Path) -> None:
    metrics = first[1]
    assert {"top1", "top1/w8", "top1/w4", "top1/w2", "ptq_top1/w2", "fp_top1"} <= metrics.keys()
    assert metrics["top1"] == metrics["top1/w8"]
    summary = read_summary(run_dir / SUMMARY)
    assert summary.distill == "in_place"
    assert {name: found["top1"] for name, found in summary.widths.items()} == {
        f"w{bits}": metrics[f"top1/w{bits}"] for bits in (8, 4, 2)
    }
    rows = list(csv.DictReader((run_dir / "results.csv").open()))
    assert [(row["w_bits"], row["a_bits"], row["widths"]) for row in rows] == [
        (str(bits), str(bits), "w8 w4 w2") for bits in (8, 4, 2)
    ]
    assert [float(row["top1"]) for row in rows] == pytest.approx([metrics[f"top1/w{b}"] for b in (8, 4, 2)], rel=1e-4)
    assert len({row["size_bytes"] for row in rows}) == 3


def test_losses_and_validation_of_each_width_are_logged(run_dir: Path) -> None:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    trained = {name for row in rows if row["split"] == "train" for name in row}
    assert {"hard", "total", "w4/soft", "w2/soft"} <= trained
    assert {"error/w2.layer1.0.conv1.weight", "error/w8.layer1.0.conv1.weight"} <= trained
    assert {"top1", "w4/top1", "w2/top1"} <= {name for row in rows if row["split"] == "val" for name in row}


def test_a_finished_run_gives_its_figures_of_each_width_again(first: tuple[Path, dict[str, Any]]) -> None:
    again = run(first[0], MANY)
    assert again == {name: value for name, value in first[1].items() if name in again}
    assert "top1/w2" in again


def test_a_width_of_the_file_is_evaluated_and_exported(first: tuple[Path, dict[str, Any]], run_dir: Path) -> None:
    pytest.importorskip("onnxruntime")
    found = run(first[0], "task=evaluate", f"checkpoint={run_dir}", "bits=2", "name=evaluated")
    assert found["top1"] == first[1]["top1/w2"]
    run(first[0], "task=export", f"checkpoint={run_dir}", "bits=2", "export.images=10")
    assert load_student(student_at(str(run_dir / "export-w2"))).training is False
    with pytest.raises(ConfigError, match="the student has 8, 4, 2 bits, not 3; take one of these"):
        run(first[0], "task=evaluate", f"checkpoint={run_dir}", "bits=3")


def test_a_killed_run_ends_with_the_same_student(
    first: tuple[Path, dict[str, Any]], run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = progress_callback.Progress.on_train_batch_end

    def killed(self: Any, trainer: Any, *arguments: Any) -> None:
        ended(self, trainer, *arguments)
        if trainer.global_step == 2:
            raise KeyboardInterrupt

    cache = f"full_precision.folder={first[0] / 'cache'}"
    with monkeypatch.context() as patched:
        patched.setattr(progress_callback.Progress, "on_train_batch_end", killed)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            run(tmp_path, MANY, cache)
    run(tmp_path, MANY, cache)
    (resumed,) = (tmp_path / "outputs").glob("*/many4-8-2")
    whole, again = latent_state(run_dir), latent_state(resumed)
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_widths_take_the_place_of_weight_and_input_and_leave_the_ends() -> None:
    alone = settings_by_width(compose([MANY]))
    assert list(alone) == [8, 4, 2]
    bits = alone[2].quantize.bits.build()(["a", "b", "c"])
    assert bits == {"a": (8, 8), "b": (2, 2), "c": (8, 8)}
    assert settings_by_width(compose([])) == {}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["many_bits.widths=[8]"], r"many_bits\.widths: must be two or more different widths"),
        (["many_bits.widths=[4, 4]"], r"many_bits\.widths: must be two or more different widths"),
        (["many_bits.widths=[8, 32]"], r"many_bits\.widths: must be two or more different widths"),
        (["target=onnxruntime"], "target: does not go with many_bits.widths=.*; train for a target with one width"),
        (["+callback@callbacks.bits=bits"], "callbacks.bits: does not go with many_bits.widths"),
        (["stages=progressive"], "stages: does not go with many_bits.widths"),
        (["quantize.fold=before"], "quantize.fold: does not go with many_bits.widths"),
        (["rounding@quantize.rounding=adaround"], "quantize.rounding: does not go with many_bits.widths"),
        (["bias@quantize.bias=batches"], "quantize.bias: does not go with many_bits.widths"),
        (["allocate@quantize.bits=integer_program"], "quantize.bits: does not go with many_bits.widths"),
        (["quantize.enabled=false"], "quantize.enabled: does not go with many_bits.widths"),
    ],
)
def test_what_does_not_go_with_many_bits_is_said_before_anything_is_trained(
    given: list[str], says: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=says) as error:
        run(tmp_path, MANY, *given)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "cache").exists()
