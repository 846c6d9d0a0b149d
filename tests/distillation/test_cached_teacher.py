"""Replay equals the live teacher bit for bit; nothing else is ever replayed; a step waits for nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qtrain.data.digits import Digits
from qtrain.distillation.cached_teacher import CachedTeacher
from qtrain.distillation.logit_format import Full, LogitFormat, TopK
from qtrain.models.ensemble import Ensemble
from qtrain.models.factory import create_model
from qtrain.models.teacher import FrozenTeacher
from qtrain.spec import Batch

FULL, TOP_K = Full(num_classes=10), TopK(num_classes=10, k=3)


def live_teacher(seed: int = 0, **options: Any) -> FrozenTeacher:
    torch.manual_seed(seed)
    model = create_model(name="cifar_resnet8", num_classes=10, in_channels=1, width=0.25)
    return FrozenTeacher(model, **options)


def digits(**options: Any) -> Digits:
    data = Digits(**{"crop_padding": 1, "flip": True, "max_train": 96, "batch_size": 32, **options})
    data.setup()
    return data


def mute(teacher: FrozenTeacher) -> FrozenTeacher:
    """A teacher that fails where it is asked."""

    def refuse(*_: Any) -> Any:
        raise AssertionError("the live teacher was asked")

    teacher.answer = refuse  # type: ignore[method-assign]
    return teacher


def cached(
    folder: Path, *, live: FrozenTeacher | None = None, data: Digits | None = None, keeps: LogitFormat = FULL
) -> CachedTeacher:
    return CachedTeacher(live or live_teacher(), data=(data or digits()).identity(), keeps=keeps, folder=folder)


def batches(data: Digits, epoch: int) -> list[Batch]:
    loader = data.train_dataloader()
    loader.set_epoch(epoch)
    return list(loader)


def epoch_of(teacher: CachedTeacher, items: list[Batch], epoch: int, rank: int = 0) -> list[Tensor]:
    teacher.begin(epoch, torch.cat([batch.index for batch in items]), rank=rank)
    answers = [teacher.answer(batch, epoch)[0] for batch in items]
    teacher.flush()
    return answers


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_replay_is_the_live_teacher_bit_for_bit(tmp_path: Path) -> None:
    data, live = digits(), live_teacher()
    expected = [[live.answer(batch, epoch)[0] for batch in batches(data, epoch)] for epoch in range(2)]
    assert not torch.equal(expected[0][0], expected[1][0]), "augmentation must differ between epochs"
    writer = cached(tmp_path)
    assert same(epoch_of(writer, batches(data, 0), 0), expected[0])
    assert same(epoch_of(writer, batches(data, 1), 1), expected[1])
    replay = cached(tmp_path, live=mute(live_teacher()))
    for epoch in (1, 0):
        assert same(epoch_of(replay, batches(data, epoch), epoch), expected[epoch])


def test_a_batch_of_other_samples_gets_their_rows(tmp_path: Path) -> None:
    """Rows go by sample number and not by place, so another order or batch size finds them too."""
    data = digits()
    items = batches(data, 0)
    answers = torch.cat(epoch_of(cached(tmp_path), items, 0))
    index = torch.cat([batch.index for batch in items])
    replay = cached(tmp_path, live=mute(live_teacher()))
    shuffled = torch.randperm(len(index), generator=torch.Generator().manual_seed(0))[:10]
    replay.begin(0, index)
    some = Batch(torch.zeros(10, 1, 8, 8), torch.zeros(10).long(), index[shuffled])
    assert torch.equal(replay.answer(some, 0)[0], answers[shuffled])


def test_top_k_writer_gets_the_same_answers_as_replays(tmp_path: Path) -> None:
    data, live = digits(), live_teacher()
    items = batches(data, 0)
    first = epoch_of(cached(tmp_path, keeps=TOP_K), items, 0)
    assert same(epoch_of(cached(tmp_path, keeps=TOP_K, live=mute(live_teacher())), items, 0), first)
    exact = live.answer(items[0], 0)[0]
    assert not torch.equal(first[0], exact)
    outside = 1 - first[0].softmax(1).topk(3, dim=1).values.sum(1)
    assert ((first[0].softmax(1) - exact.softmax(1)).abs().sum(1) / 2 <= outside + 2**-11 * (1 + 2.31)).all()


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: cached(folder, live=live_teacher(seed=1)),
        lambda folder: cached(folder, live=live_teacher(bf16=True)),
        lambda folder: cached(folder, live=live_teacher(mean=[0.5], std=[0.5], data_mean=[0.3], data_std=[0.4])),
        lambda folder: cached(folder, data=digits(seed=1)),
        lambda folder: cached(folder, data=digits(flip=False)),
        lambda folder: cached(folder, data=digits(crop_padding=2)),
        lambda folder: cached(folder, data=digits(mixup=0.2)),
        lambda folder: cached(folder, data=digits(mean=[0.2], std=[0.4])),
        lambda folder: cached(folder, keeps=TOP_K),
    ],
    ids=["weights", "precision", "normalization", "seed", "flip", "crop", "mixup", "mean and std", "format"],
)
def test_settings_that_change_answers_change_the_cache_key(
    change: Callable[[Path], CachedTeacher], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = batches(digits(), 0)
    epoch_of(cached(tmp_path), items, 0)
    other = change(tmp_path)
    mute(other._live)
    with pytest.raises(AssertionError, match="was asked"):
        epoch_of(other, items, 0)


def ensemble(**options: Any) -> FrozenTeacher:
    members = {f"member{seed}": live_teacher(seed).model for seed in range(2)}
    return FrozenTeacher(Ensemble(members=members, **options))


def test_options_without_weights_change_the_teachers_identity() -> None:
    """The same weights, of the same shapes, in other layers, shares or ways of combining."""
    other = live_teacher()
    assert live_teacher().identity() == other.identity()
    other.model.act1 = torch.nn.GELU()
    assert live_teacher().identity() != other.identity()
    ensembles = [ensemble(), ensemble(shares={"member0": 1.0, "member1": 3.0}), ensemble(combine="probabilities")]
    keys = [str(one.identity()) for one in ensembles]
    assert len(set(keys)) == 3 and str(ensemble().identity()) == keys[0]


@pytest.mark.slow
def test_the_identity_is_the_same_in_another_process() -> None:
    code = (
        "import torch; from qtrain.models.factory import create_model; from qtrain.models.teacher import FrozenTeacher;"
        "torch.manual_seed(0);"
        "model = create_model(name='cifar_resnet8', num_classes=10, in_channels=1, width=0.25);"
        "print(FrozenTeacher(model).identity())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(live_teacher().identity())


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_file_is_rebuilt(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = digits()
    items = batches(data, 0)
    expected = epoch_of(cached(tmp_path), items, 0)
    (path,) = tmp_path.rglob("*.safetensors")
    whole = path.read_bytes()
    if damage == "flip":
        path.write_bytes(whole[:-100] + bytes([whole[-100] ^ 255]) + whole[-99:])
    elif damage == "truncate":
        path.write_bytes(whole[: len(whole) // 2])
    else:
        path.unlink()
    with pytest.raises(AssertionError, match="was asked"):
        epoch_of(cached(tmp_path, live=mute(live_teacher())), items, 0)
    assert ("damaged" in caplog.text) is (damage != "remove")
    assert same(epoch_of(cached(tmp_path), items, 0), expected)
    assert path.read_bytes() == whole, "rebuilt, to the last bit"
    assert same(epoch_of(cached(tmp_path, live=mute(live_teacher())), items, 0), expected)


def test_interrupted_epoch_is_completed(tmp_path: Path) -> None:
    data = digits()
    items = batches(data, 0)
    expected = [live_teacher().answer(batch, 0)[0] for batch in items]
    killed = cached(tmp_path)
    killed.begin(0, torch.cat([batch.index for batch in items]))
    killed.answer(items[0], 0)
    killed.flush()  # as before a resume point; what follows is lost
    killed.answer(items[1], 0)
    resumed = cached(tmp_path)
    assert same(epoch_of(resumed, items[1:], 0), expected[1:])
    assert same(epoch_of(cached(tmp_path, live=mute(live_teacher())), items, 0), expected)


def test_cache_is_shared_between_one_and_two_ranks(tmp_path: Path) -> None:
    class Rank:
        def __init__(self, rank: int, world_size: int) -> None:
            self.global_rank, self.world_size = rank, world_size
            self.strategy = type("Strategy", (), {"root_device": torch.device("cpu")})

    def items(rank: int, world_size: int) -> list[Batch]:
        data = digits()
        data.trainer = Rank(rank, world_size)  # type: ignore[assignment]
        return batches(data, 0)

    for rank in range(2):
        epoch_of(cached(tmp_path / "two"), items(rank, 2), 0, rank)
    assert len(list((tmp_path / "two").rglob("*.safetensors"))) == 2
    epoch_of(cached(tmp_path / "one"), items(0, 1), 0)
    for folder in ("one", "two"):
        whole = epoch_of(cached(tmp_path / folder, live=mute(live_teacher())), items(0, 1), 0)
        live = [live_teacher().answer(batch, 0)[0] for batch in items(0, 1)]
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(whole, live, strict=True))
        for rank in range(2):
            half = epoch_of(cached(tmp_path / folder, live=mute(live_teacher())), items(rank, 2), 0, rank)
            assert same(half, [answer[16 * rank : 16 * (rank + 1)] for answer in whole])


class NoWaiting(TorchDispatchMode):
    """Fails where a value of a tensor is asked for, or a tensor moves."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        assert name not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal"), name
        assert "device" not in (kwargs or {}) or name != "aten::_to_copy", name
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=[FULL, TOP_K], ids=["full", "top_k"])
def both(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[CachedTeacher, CachedTeacher, list[Batch]]]:
    items = batches(digits(), 0)
    epoch_of(cached(tmp_path, keeps=request.param), items, 0)
    writer, replay = (cached(folder, keeps=request.param) for folder in (tmp_path / "new", tmp_path))
    for teacher in (writer, replay):
        teacher.begin(0, torch.cat([batch.index for batch in items]))
    yield writer, replay, items


def test_no_step_waits_on_the_host(both: tuple[CachedTeacher, CachedTeacher, list[Batch]]) -> None:
    writer, replay, items = both
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoWaiting():
        items[0].image.sum().item()
    for teacher in (writer, replay):
        with NoWaiting():
            for batch in items:
                teacher.answer(batch, 0)


def test_a_replayed_step_compiles_as_a_whole(both: tuple[CachedTeacher, CachedTeacher, list[Batch]]) -> None:
    torch._dynamo.reset()
    _, replay, items = both
    compiled = torch.compile(lambda batch: replay.answer(batch, 0)[0], fullgraph=True, backend="eager")
    assert torch.equal(compiled(items[0]), replay.answer(items[0], 0)[0])


def test_epoch_that_was_not_begun_is_answered_live(tmp_path: Path) -> None:
    items = batches(digits(), 0)
    teacher = cached(tmp_path)
    assert torch.equal(teacher.answer(items[0], 0)[0], live_teacher().answer(items[0], 0)[0])
    teacher.begin(1, torch.cat([batch.index for batch in items]))
    teacher.answer(items[0], 0)
    teacher.flush()
    assert list(tmp_path.rglob("*.safetensors")) == []


def test_failing_disk_gives_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    data = digits()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    teacher = cached(tmp_path)
    for epoch in range(3):
        expected = [live_teacher().answer(batch, epoch)[0] for batch in batches(data, epoch)]
        assert same(epoch_of(teacher, batches(data, epoch), epoch), expected)
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1 and "no space left on the disk of" in warnings[0] and "goes on live" in warnings[0]


def test_folder_that_cannot_be_made_gives_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    teacher = cached(tmp_path / "file")
    items = batches(digits(), 0)
    for epoch in range(2):
        epoch_of(teacher, items, epoch)
    assert caplog.text.count("cannot keep the teacher's answers") == 1


def test_hints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no features, but hints look at layer2; ask the live teacher"):
        cached(tmp_path, live=live_teacher(names=["layer2"]))


def test_to_device_moves_the_cached_epoch(tmp_path: Path) -> None:
    items = batches(digits(), 0)
    teacher = cached(tmp_path)
    teacher.begin(0, torch.cat([batch.index for batch in items]))
    first = teacher.answer(items[0], 0)[0]
    assert teacher.to("cpu") is teacher
    assert torch.equal(teacher.answer(items[0], 0)[0], first)
    teacher.flush()
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("keeps", [FULL, TOP_K], ids=["full", "top_k"])
def test_replay_on_a_gpu_does_not_wait(keeps: LogitFormat, tmp_path: Path) -> None:
    items = [Batch(*(part.cuda() for part in batch)) for batch in batches(digits(), 0)]
    sample = torch.cat([batch.index for batch in items]).cpu()
    answers = []
    for live in (live_teacher(), mute(live_teacher())):
        teacher = cached(tmp_path, live=live, keeps=keeps).to("cuda")
        teacher.begin(0, sample)
        torch.cuda.set_sync_debug_mode("error")
        try:
            answers.append([teacher.answer(batch, 0)[0] for batch in items])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        teacher.flush()
    assert same(*answers)
