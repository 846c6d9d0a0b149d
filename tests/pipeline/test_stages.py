"""A run of several stages: what passes between them, resumption in the middle of any, and mistakes."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import qtrain
from qtrain.config.compose import compose
from qtrain.convert.inherit import StudentState
from qtrain.pipeline import train
from qtrain.pipeline.run_stage import _steps
from qtrain.pipeline.stages import STATE, Stage, StageState, stages_of
from qtrain.run_task import run_task
from qtrain.spec import Position
from qtrain.utils.errors import ConfigError
from tests.helpers.latent import latent_state

TINY = """
    trainer=cpu data.max_train=320 data.max_test=64 model=cifar_resnet8 model.width=0.25 fit.epochs=2 data.batch_size=32
    full_precision.epochs=1 fit.reestimate_bn=0 quantize.calibration_batches=1 fit.log_every_steps=1
    fit.health_every_steps=0 quantize.bits.weight=4 quantize.bits.input=4 quantize.weight.init=range
    quantize.input.init=range optimizer.lr=0.01 name=run
""".split()
TEACHER = ["teacher=cifar_resnet20", "teacher.model.width=0.25", "objective=soft"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Full-precision weights, trained once for all tests here."""
    return tmp_path_factory.mktemp("cache")


def run(cache: Path, folder: Path, *more: str) -> dict[str, Any]:
    overrides = [*TINY, f"output={folder}", f"full_precision.folder={cache}", *more]
    return run_task(compose(overrides), overrides)


def weights(folder: Path) -> dict[str, Tensor]:
    (path,) = folder.rglob("student.ckpt")
    return latent_state(path.parent)


def rows(folder: Path) -> list[dict[str, Any]]:
    (path,) = folder.rglob("metrics.jsonl")
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("time", "images_per_s")} for row in kept]


def stages(**own: list[str]) -> list[str]:
    return [f"+stages.{name}=[{','.join(map(repr, given))}]" for name, given in own.items()]


def test_one_stage_equals_the_same_run_written_as_two(cache: Path, tmp_path: Path) -> None:
    """Adam's moments, the rate's place on its cosine, the order of images and the rows' numbers all go on."""
    run(cache, tmp_path / "one", "optimizer=adam")
    part = ["schedule@lr_schedule=window", "fit.share=0.5"]
    first = [*part, "lr_schedule.begin=0.0", "lr_schedule.finish=0.5"]
    second = [*part, "lr_schedule.begin=0.5", "lr_schedule.finish=1.0", "fit.carry_optimizer=true"]
    run(cache, tmp_path / "two", "optimizer=adam", *stages(first=first, second=second))
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert rows(tmp_path / "one") == rows(tmp_path / "two")


def test_stages_differ_in_bits_objective_and_length(cache: Path, tmp_path: Path) -> None:
    own = stages(
        wide=["quantize.bits.weight=8", "quantize.bits.input=8", "objective=hard", "fit.share=0.25"],
        narrow=["quantize.bits.weight=2", "quantize.bits.input=2", "fit.share=0.75"],
    )
    metrics = run(cache, tmp_path, *TEACHER, "quantize.bits.weight=3", *own)
    trained = weights(tmp_path)
    assert int(trained["layer1.0.conv1.weight_quantizer.bits"]) == 2
    checkpoint = next(tmp_path.rglob("run/config.yaml")).parent
    assert run(cache, tmp_path, "task=evaluate", f"checkpoint={checkpoint}")["top1"] == metrics["top1"]
    written = [row for row in rows(tmp_path) if row["split"] == "train" and "total" in row]
    assert [row["step"] for row in written] == list(range(1, 21))
    assert ["soft" in row for row in written] == [False] * 5 + [True] * 15
    with next(tmp_path.rglob("run/results.csv")).open() as file:
        (row,) = csv.DictReader(file)
    assert (row["w_bits"], row["a_bits"], row["distill"], row["epochs"]) == ("2", "2", "soft", "2")
    assert "stages wide narrow" in row["notes"]


@pytest.mark.slow
def test_a_run_killed_in_a_later_stage_goes_on_there(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = stages(first=["fit.share=0.5"], second=["fit.share=0.5", "objective=hard"])
    settings = (*TEACHER, *own, "fit.checkpoint_every_steps=3")
    run(cache, tmp_path / "whole", *settings)

    done: list[str] = []
    fit = train.run_stage

    def killed(stage: Stage, *arguments: Any) -> Any:
        if stage.name == "second":
            raise KeyboardInterrupt
        return fit(stage, *arguments)

    monkeypatch.setattr(train, "run_stage", killed)
    with pytest.raises(KeyboardInterrupt):
        run(cache, tmp_path / "killed", *settings)

    def counted(stage: Stage, *arguments: Any) -> Any:
        done.append(stage.name)
        return fit(stage, *arguments)

    monkeypatch.setattr(train, "run_stage", counted)
    run(cache, tmp_path / "killed", *settings)
    assert done == ["second"], "the first stage had ended"
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert rows(tmp_path / "whole") == rows(tmp_path / "killed")


def test_a_stage_may_see_other_images(cache: Path, tmp_path: Path) -> None:
    own = stages(few=["data.max_train=64", "fit.share=0.5"], all=["fit.share=0.5", "data.batch_size=16"])
    run(cache, tmp_path, *own)
    assert rows(tmp_path)[-1]["step"] == 2 + 20, "an epoch of 2 batches, then one of 20"


def test_starting_over_repeats_every_stage(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = [*stages(first=["fit.share=0.5"], second=["fit.share=0.5"]), "fit.final_test=false"]
    run(cache, tmp_path, *own)
    begun: list[str] = []
    run_stage = train.run_stage

    def counted(stage: Stage, *arguments: Any) -> Any:
        begun.append(stage.name)
        return run_stage(stage, *arguments)

    monkeypatch.setattr(train, "run_stage", counted)
    with pytest.raises(ConfigError, match="holds a run of another config"):
        run(cache, tmp_path, *own, "optimizer.lr=0.02")
    run(cache, tmp_path, *own, "optimizer.lr=0.02", "overwrite=true")
    assert begun == ["first", "second"]


def test_a_damaged_state_is_a_stage_to_repeat(cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(cache, tmp_path, *stages(first=["fit.share=0.5"], second=["fit.share=0.5"]), "fit.final_test=false")
    (state,) = tmp_path.rglob(STATE)
    state.write_bytes(state.read_bytes()[:1000])
    stage = Stage("first", compose(), state.parent)
    assert stage.load() is None
    assert "is damaged" in caplog.text


def test_a_teacher_that_learns_passes_to_the_next_stage(cache: Path, tmp_path: Path) -> None:
    own = stages(
        together=["teacher.learns=true", "+objective@teacher.objective=soft", "teacher.lr=0.01", "fit.share=0.5"],
        after=["fit.share=0.5"],
    )
    run(cache, tmp_path, *TEACHER, *own)
    (path,) = tmp_path.rglob(STATE)
    state = torch.load(path, weights_only=True)
    (before,) = (load_file(p) for p in cache.rglob("*resnet20*/model.safetensors"))
    moved = [name for name, tensor in before.items() if not torch.equal(tensor, state["teacher"][name])]
    assert "conv1.weight" in moved
    assert "bn1.running_mean" in moved
    written = [row for row in rows(tmp_path) if "total" in row]
    assert all("teacher/soft" in row for row in written[:10])
    assert not any("teacher/soft" in row for row in written[10:])
    assert not any(name.startswith("teacher") for name in weights(tmp_path)), "the student alone is saved"


@pytest.mark.parametrize("name", ["fitnets", "qkd", "progressive", "profit"])
def test_every_stages_file_is_a_run(name: str, cache: Path, tmp_path: Path) -> None:
    layers = ["distill.student_layers=[layer2]", "distill.teacher_layers=[layer2]"]
    metrics = run(cache, tmp_path, *TEACHER, *layers, f"stages={name}", "data.batch_size=8")
    assert metrics["top1"] is not None
    assert rows(tmp_path)[-1]["step"] == 80, "the shares add up to one"


def test_deep_compression_clusters_what_pruning_has_left(cache: Path, tmp_path: Path) -> None:
    """What the first stage sets to zero is zero in the end, and nothing else; the others have at most 16 values."""
    wrapper = ["+quantizer@quantize.weight_wrapper=pruned", "quantize.weight_wrapper.share=0.6"]
    common = [override for override in TINY if override != "quantize.weight.init=range"]
    common += [f"output={tmp_path}", f"full_precision.folder={cache}", "quantize.bits.input=32"]
    settings = compose(overrides := [*common, *TEACHER, *wrapper, "stages=deep_compression"])
    run_task(settings, overrides)
    (first,) = tmp_path.rglob("1-prune")
    before, after = Stage("prune", settings, first).load(), weights(tmp_path)
    assert before is not None
    (student,) = tmp_path.rglob("student.ckpt")
    stored = qtrain.load(student.parent / "student.safetensors").state_dict()
    for name in (name for name in after if re.fullmatch(r"layer.*conv\d\.weight", name)):
        zero = before.student.tensors[name] == 0
        assert zero.sum() == round(0.6 * zero.numel()), name
        assert torch.equal(after[name] == 0, zero), name
        assert 2 < len(stored[name].unique()) <= 17, "zero and the centroids that have members"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+stages.a=['fit.epoch=3']", r"stages\.a: .*fit\.epoch"),
        ("+stages.a=['seed=3']", r"stages\.a: changes seed, which all stages of a run share"),
        ("+stages.a=['model=cifar_resnet20']", r"stages\.a: changes model"),
        ("+stages.a=3", r"stages\.a: must be a list of overrides"),
        ("+stages.a=['allow_targets=[os]']", r"stages\.a: .*command line only"),
        ("stages=progresive", r"there is no such stages.*progressive"),
    ],
)
def test_a_mistake_in_a_stage_is_said_before_anything_runs(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose([*TINY, override])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["fit.share=0"], r"fit.share: must be in \(0, 1\], got 0.0"),
        (["teacher.learns=true"], "teacher.learns: there is no teacher"),
        ([*TEACHER, "teacher.learns=true"], r"teacher.learns: .*needs an objective of its own"),
        (["fit.freeze.share=0.5"], "freeze"),
        (["fit.freeze.layers=[nothing*]"], "nothing"),
        (
            stages(a=["fit.share=0.5"], b=["fit.share=0.5", "fit.carry_optimizer=true", "quantize.enabled=false"]),
            "fit.carry_optimizer",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(more: list[str], message: str, cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        run(cache, tmp_path, *more)


def test_a_run_without_stages_is_a_stage_without_a_name(tmp_path: Path) -> None:
    (only,) = stages_of(compose(), tmp_path)
    assert (only.name, only.folder) == ("", tmp_path)


def test_state_hands_on_what_a_stage_did_not_change() -> None:
    """Seconds add up, terms and metrics gather, and the last teacher that learned stays with its config."""
    student, end = StudentState({}, {}), Position(epoch=1, step=5)
    taught = {"w": torch.ones(1)}
    first = StageState(
        student, end, teacher=taught, teacher_model={"depth": 20}, metrics={"a": {"x": 1.0}, "b": {"x": 2.0}},
        train_s=3.0, distill=("soft", "hint"),
    )  # fmt: skip
    second = StageState(student, Position(2, 9), metrics={"b": {"x": 4.0}}, train_s=0.5, distill=("hint", "attention"))
    both = second.after(first)
    assert (both.end, both.train_s) == (Position(2, 9), 3.5)
    assert both.distill == ("soft", "hint", "attention")
    assert both.metrics == {"a": {"x": 1.0}, "b": {"x": 4.0}}
    assert both.teacher is taught and both.teacher_model == {"depth": 20}
    assert second.after(None) is second


@pytest.mark.parametrize(("share", "accumulated", "steps"), [(1, 4, None), (0.5, 1, 10), (0.5, 4, 3), (0.001, 4, 1)])
def test_share_of_a_stage_is_counted_in_optimizer_steps(share: float, accumulated: int, steps: int | None) -> None:
    """Of 2 epochs of 10 batches, the last of which are a step too where there are fewer than are added up."""
    settings = compose(["fit.epochs=2", f"fit.share={share}", f"trainer.accumulate_grad_batches={accumulated}"])
    data: Any = SimpleNamespace(train_dataloader=lambda: range(10))
    assert _steps(settings, data) == steps


def test_batch_norm_is_estimated_anew_from_images_of_the_epoch_after_the_last() -> None:
    """Augmented as no step has seen them."""
    asked: list[int] = []

    class Images(list[SimpleNamespace]):
        set_epoch = asked.append

    images = Images(
        SimpleNamespace(image=torch.full((4, 1, 2, 2), float(n)) + torch.randn(4, 1, 2, 2)) for n in (1, 2, 9)
    )
    norm = torch.nn.BatchNorm2d(1)
    data: Any = SimpleNamespace(train_dataloader=lambda: images)
    settings = compose(["fit.epochs=7", "fit.reestimate_bn=2"])
    train._reestimate_batchnorm(settings, norm, data, torch.device("cpu"))
    assert asked == [7]
    mean = torch.stack([batch.image.mean() for batch in images[:2]]).mean()
    torch.testing.assert_close(norm.running_mean, mean.reshape(1))
