"""``teacher.cache`` from the command line: runs and stages that share answers, and those that cannot have them kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qtrain.config.compose import compose
from qtrain.models.teacher import FrozenTeacher
from qtrain.run_task import run_task
from qtrain.utils.errors import ConfigError

TINY = """
    trainer=cpu data.max_train=96 data.max_test=32 model=cifar_resnet8 model.width=0.25 fit.epochs=2 data.batch_size=32
    full_precision.epochs=1 fit.reestimate_bn=0 quantize.calibration_batches=1 fit.health_every_steps=0
    quantize.weight.init=range quantize.input.init=range optimizer.lr=0.01 fit.final_test=false
    teacher=cifar_resnet20 teacher.model.width=0.25 objective=soft
""".split()
STEPS = 3  # of an epoch


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Full-precision weights, trained once for all tests here."""
    return tmp_path_factory.mktemp("weights")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The epochs of all questions that live teachers were asked."""
    epochs: list[int] = []
    answer = FrozenTeacher.answer

    def listen(self: FrozenTeacher, batch: Any, epoch: int) -> Any:
        epochs.append(epoch)
        return answer(self, batch, epoch)

    monkeypatch.setattr(FrozenTeacher, "answer", listen)
    return epochs


def run(weights: Path, folder: Path, name: str, *more: str) -> dict[str, Tensor]:
    places = [f"output={folder}", f"full_precision.folder={weights}", f"teacher.cache.folder={folder / 'cache'}"]
    overrides = [*TINY, *places, f"name={name}", *more]
    run_task(compose(overrides), overrides)
    (path,) = folder.rglob(f"{name}/student.safetensors")
    return load_file(path)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_second_run_replays_and_ends_as_the_live_one(weights: Path, tmp_path: Path, asked: list[int]) -> None:
    live = run(weights, tmp_path, "live")
    assert asked == [0] * STEPS + [1] * STEPS
    assert same(run(weights, tmp_path, "first", "teacher_cache=full"), live)
    assert asked == 2 * ([0] * STEPS + [1] * STEPS)
    assert same(run(weights, tmp_path, "second", "teacher_cache=full"), live)
    assert len(asked) == 4 * STEPS, "replayed"


def test_top_k_runs_end_alike(weights: Path, tmp_path: Path, asked: list[int]) -> None:
    top_k = ["teacher_cache=top_k", "teacher.cache.keeps.k=3"]
    assert same(run(weights, tmp_path, "first", *top_k), run(weights, tmp_path, "second", *top_k))
    assert len(asked) == 2 * STEPS


def test_trials_with_other_bits_share_the_answers(weights: Path, tmp_path: Path, asked: list[int]) -> None:
    for name, bits in (("four", 4), ("two", 2)):
        run(weights, tmp_path, name, "teacher_cache=full", f"quantize.bits.weight={bits}")
    assert len(asked) == 2 * STEPS
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_stages_share_the_answers_of_the_same_epochs(weights: Path, tmp_path: Path, asked: list[int]) -> None:
    """One fit of two epochs writes what two stages of one epoch each replay."""
    run(weights, tmp_path, "one", "teacher_cache=full")
    asked.clear()
    halves = [f"+stages.{name}=['fit.share=0.5']" for name in ("a", "b")]
    run(weights, tmp_path, "two", "teacher_cache=full", *halves)
    assert asked == []


def test_hints_are_answered_live(
    weights: Path, tmp_path: Path, asked: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    run(weights, tmp_path, "hints", "objective=soft_hint", "teacher_cache=full", "fit.epochs=1")
    assert len(asked) == STEPS
    assert "teacher.cache: keeps no features, and hints look at layer2; it answers live" in caplog.text
    assert not (tmp_path / "cache").exists()


def test_a_teacher_that_learns_is_not_kept(weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    learns = ["teacher.learns=true", "+objective@teacher.objective=soft"]
    run(weights, tmp_path, "learns", *learns, "teacher_cache=full", "fit.epochs=1")
    assert "teacher.cache: a teacher that learns answers otherwise at each step; nothing is kept" in caplog.text
    assert not (tmp_path / "cache").exists()


def test_the_place_is_no_part_of_a_runs_identity() -> None:
    for more in (["teacher_cache=full"], ["stages=qkd", "teacher_cache=top_k"]):
        here, there = (compose([*TINY, *more, f"teacher.cache.folder={place}"]) for place in ("/here", "/there"))
        assert here.identity == there.identity
    assert compose([*TINY, "teacher_cache=top_k"]).identity != compose(TINY).identity


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("teacher_cache=ful", r"teacher_cache=ful: there is no such teacher_cache; did you mean 'full'"),
        ("teacher.cache.size=3", r"unknown key 'teacher\.cache\.size'"),
        ("teacher.cache.keeps.k=many", r"could not override .teacher\.cache\.keeps\.k|unknown key"),
    ],
)
def test_mistakes_are_said_at_once(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose([*TINY, override])


def test_more_classes_than_there_are(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"teacher\.cache: TopK: k must be .* below the 10 classes, got 10; teacher_cache=full"
    ):
        run(weights, tmp_path, "k", "teacher_cache=top_k", "teacher.cache.keeps.k=10")
