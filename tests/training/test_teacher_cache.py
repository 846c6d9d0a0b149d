"""Whole fits with a cached teacher: writing, replaying, killed in between; the student never knows the difference."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor

from qtrain.data.digits import Digits
from qtrain.distill.cached_teacher import CachedTeacher
from qtrain.distill.hard import Hard
from qtrain.distill.logit_format import Full, LogitFormat, TopK
from qtrain.distill.objective import Objective
from qtrain.distill.soft import Soft
from qtrain.models.factory import create_model
from qtrain.models.teacher import FrozenTeacher
from qtrain.schedules.linear import Linear
from qtrain.spec import Batch, Position
from qtrain.training.checkpoint import AtomicCheckpointIO, find_resume_point
from qtrain.training.module import QATModule
from qtrain.training.resume import ResumePoints

EPOCHS, STEPS = 2, 5
FULL, TOP_K = Full(num_classes=10), TopK(num_classes=10, k=3)


class Killed(Exception):
    """What stands for SIGKILL here: nothing is saved after it."""


class Counting(FrozenTeacher):
    """Counts how often it is asked; ``limit`` is the last time that it answers."""

    asked = 0
    limit: int | None = None

    def answer(self, batch: Batch, epoch: int) -> tuple[Tensor, dict[str, Tensor]]:
        self.asked += 1
        if self.limit is not None and self.asked > self.limit:
            raise Killed
        return super().answer(batch, epoch)


class KillAt(pl.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise Killed


def network(width: float, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return create_model(name="cifar_resnet8", num_classes=10, in_channels=1, width=width)


class Run:
    """A student of a few digits, its teacher, and where both write; made anew for each attempt."""

    def __init__(self, folder: Path, cache: Path | None, *, keeps: LogitFormat = FULL, **data: Any) -> None:
        self.folder = folder
        self.data = Digits(max_train=176, batch_size=32, crop_padding=1, flip=True, **data)
        self.data.setup()
        self.live = Counting(network(0.5, 1))
        self.teacher = cache and CachedTeacher(self.live, data=self.data.identity(), keeps=keeps, folder=cache)

    def fit(self, *callbacks: pl.Callback, start: Position = Position(), **options: Any) -> dict[str, Tensor]:  # noqa: B008
        self.data.start_at(start.epoch)
        module = QATModule(
            student=network(0.25, 0),
            objective=Objective(terms={"hard": Hard(weight=0.5), "soft": Soft(weight=0.5, temperature=4.0)}),
            teacher=self.teacher or self.live,
            optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9),
            lr_schedule=Linear(start=1.0, end=0.0),
            num_classes=10,
            seed=0,
            start=start,
        )
        points = ResumePoints(folder=self.folder / "checkpoints", every_n_steps=2, identity="run")
        trainer = pl.Trainer(
            accelerator="cpu",
            logger=False,
            callbacks=[*callbacks, points],
            plugins=[AtomicCheckpointIO()],
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            limit_val_batches=0,
            default_root_dir=self.folder,
            **{"max_epochs": EPOCHS, **options},
        )
        trainer.fit(module, datamodule=self.data, ckpt_path=find_resume_point(points.folder))
        return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The student's weights after a run with a live teacher."""
    run = Run(tmp_path_factory.mktemp("live"), None)
    trained = run.fit()
    assert run.live.asked == EPOCHS * STEPS
    return trained


def identical(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_runs_that_write_or_replay_the_cache_end_as_without_a_cache(tmp_path: Path, live: dict[str, Tensor]) -> None:
    writer = Run(tmp_path / "one", tmp_path / "cache")
    assert identical(writer.fit(), live)
    replay = Run(tmp_path / "two", tmp_path / "cache")
    assert identical(replay.fit(), live)
    assert (writer.live.asked, replay.live.asked) == (EPOCHS * STEPS, 0)
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == EPOCHS


def test_top_k_runs_agree_with_each_other(tmp_path: Path, live: dict[str, Tensor]) -> None:
    one = Run(tmp_path / "one", tmp_path / "cache", keeps=TOP_K).fit()
    replay = Run(tmp_path / "two", tmp_path / "cache", keeps=TOP_K)
    assert identical(replay.fit(), one)
    assert replay.live.asked == 0
    assert not identical(one, live)


def test_runs_with_other_seeds_do_not_share_a_teacher_cache(tmp_path: Path) -> None:
    Run(tmp_path / "one", tmp_path / "cache").fit()
    other = Run(tmp_path / "two", tmp_path / "cache", seed=1)
    other.fit()
    assert other.live.asked == EPOCHS * STEPS


def test_runs_with_other_batch_sizes_and_students_share_a_teacher_cache(tmp_path: Path) -> None:
    """What does not change an image is no part of the key; a smaller batch begins with the same samples."""
    Run(tmp_path / "one", tmp_path / "cache").fit(max_epochs=1)
    other = Run(tmp_path / "two", tmp_path / "cache", max_test=7, eval_batch_size=3)
    other.data.batch_size = 16
    other.fit(max_epochs=1, limit_train_batches=2)
    assert other.live.asked == 0


@pytest.mark.parametrize("step", [1, 3, 4, 5, 7])
def test_killed_run_with_teacher_cache_ends_as_an_undisturbed_one(
    step: int, tmp_path: Path, live: dict[str, Tensor]
) -> None:
    """Killed before, between and after resume points (steps 2, 4, 5, 6, 8, 10), in the writing run."""
    with pytest.raises(Killed):
        Run(tmp_path / "one", tmp_path / "cache").fit(KillAt(step))
    resumed = Run(tmp_path / "one", tmp_path / "cache")
    assert identical(resumed.fit(), live)
    # The resume point and the answers before it were written together: what is asked again is what was lost.
    lost = {1: 1, 3: 1, 4: 0, 5: 0, 7: 1}[step]
    assert resumed.live.asked == EPOCHS * STEPS - step + lost
    replay = Run(tmp_path / "two", tmp_path / "cache")
    assert identical(replay.fit(), live)
    assert replay.live.asked == 0, "the cache is whole"


def test_killed_replay_of_a_teacher_cache_continues_replaying(tmp_path: Path, live: dict[str, Tensor]) -> None:
    Run(tmp_path / "one", tmp_path / "cache").fit()
    with pytest.raises(Killed):
        Run(tmp_path / "two", tmp_path / "cache").fit(KillAt(3))
    resumed = Run(tmp_path / "two", tmp_path / "cache")
    resumed.live.limit = 0
    assert identical(resumed.fit(), live)


def test_unfinished_epoch_of_a_teacher_cache_is_completed_by_the_next_run(
    tmp_path: Path, live: dict[str, Tensor]
) -> None:
    with pytest.raises(Killed):
        Run(tmp_path / "one", tmp_path / "cache").fit(KillAt(7))
    other = Run(tmp_path / "two", tmp_path / "cache")
    assert identical(other.fit(), live)
    assert other.live.asked == STEPS, "the first epoch is replayed, the second, half kept, asked for anew"
    third = Run(tmp_path / "three", tmp_path / "cache")
    assert identical(third.fit(), live)
    assert third.live.asked == 0


def test_damaged_teacher_cache_costs_only_the_damaged_epoch(
    tmp_path: Path, live: dict[str, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    Run(tmp_path / "one", tmp_path / "cache").fit()
    second = sorted((tmp_path / "cache").rglob("*.safetensors"))[1]
    content = bytearray(second.read_bytes())
    content[-50] ^= 4
    second.write_bytes(content)
    rebuilding = Run(tmp_path / "two", tmp_path / "cache")
    assert identical(rebuilding.fit(), live)
    assert rebuilding.live.asked == STEPS
    assert caplog.text.count("are damaged") == 1
    content[-50] ^= 4
    assert second.read_bytes() == content


def test_fit_with_max_steps_is_replayed_from_the_teacher_cache(tmp_path: Path) -> None:
    """A stage may end in the middle of an epoch; no more than its own samples are needed."""
    first = Run(tmp_path / "one", tmp_path / "cache").fit(max_steps=7, max_epochs=-1)
    replay = Run(tmp_path / "two", tmp_path / "cache")
    assert identical(replay.fit(max_steps=7, max_epochs=-1), first)
    assert replay.live.asked == 0


def test_teacher_cache_of_a_later_stage_uses_the_epochs_of_the_run(tmp_path: Path) -> None:
    """Epochs of the run and not of the fit: other images, other answers."""
    later = Position(epoch=2, step=10)
    expected = Run(tmp_path / "live", None).fit(start=later)
    for name in ("one", "two"):
        assert identical(Run(tmp_path / name, tmp_path / "cache").fit(start=later), expected)
    names = sorted(path.name for path in (tmp_path / "cache").rglob("*.safetensors"))
    assert names == ["epoch-00002.rank0.safetensors", "epoch-00003.rank0.safetensors"]


def test_teacher_cache_works_with_accumulated_gradients(tmp_path: Path) -> None:
    first = Run(tmp_path / "one", tmp_path / "cache").fit(accumulate_grad_batches=2)
    replay = Run(tmp_path / "two", tmp_path / "cache")
    assert identical(replay.fit(accumulate_grad_batches=2), first)
    assert replay.live.asked == 0
