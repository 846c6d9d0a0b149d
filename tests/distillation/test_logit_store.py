"""Answers on disk: what is written is read, by whatever rank; what is damaged, foreign or half there is not."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qtrain.distillation.logit_store import LOGITS_MANIFEST, LogitRows, LogitStore, merge

DESCRIPTION = {"data": {"name": "digits", "seed": 0}, "teacher": {"weights": "abc"}, "keeps": {"kind": "full"}}


def store(folder: Path, **changes: Any) -> LogitStore:
    return LogitStore(folder, name="digits", description={**DESCRIPTION, **changes})


def rows(*samples: int, shift: float = 0.0) -> LogitRows:
    sample = torch.tensor(samples)
    return LogitRows(sample, {"logits": sample[:, None] + torch.tensor([[0.25, 0.5]]) + shift})


def values(kept: LogitRows | None, *samples: int) -> Tensor:
    assert kept is not None
    place = kept.find(torch.tensor(samples))
    assert place is not None
    return kept.columns["logits"][place]


def shards(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def test_written_rows_are_read_back(tmp_path: Path) -> None:
    one = store(tmp_path)
    assert one.read(3) is None
    one.write(3, 0, rows(5, 1, 4))
    assert torch.equal(values(store(tmp_path).read(3), 1, 5), rows(1, 5).columns["logits"])
    assert one.read(2) is None
    assert [path.name for path in one.folder.iterdir() if path.name.startswith(".")] == []


def test_find_needs_all_samples() -> None:
    kept = rows(5, 1, 4)
    assert kept.find(torch.tensor([4, 5])).tolist() == [2, 0]  # type: ignore[union-attr]
    for absent in ([0], [4, 2], [900]):
        assert kept.find(torch.tensor(absent)) is None
    assert LogitRows(torch.tensor([], dtype=torch.int64), {}).find(torch.tensor([1])) is None


def test_merging_prefers_the_second() -> None:
    both = merge(rows(1, 2), rows(2, 3, shift=10.0))
    assert sorted(both.sample.tolist()) == [1, 2, 3]
    assert values(both, 1, 2, 3)[:, 0].tolist() == [1.25, 12.25, 13.25]


def test_ranks_write_each_its_own_and_read_all(tmp_path: Path) -> None:
    store(tmp_path).write(0, 0, rows(0, 2))
    store(tmp_path).write(0, 1, rows(1, 3))
    assert len(shards(tmp_path)) == 2
    assert torch.equal(values(store(tmp_path).read(0), 0, 1, 2, 3), rows(0, 1, 2, 3).columns["logits"])


def test_late_writer_adds_rows_and_removes_none(tmp_path: Path) -> None:
    one = store(tmp_path)
    one.write(0, 0, rows(0, 1, 2))
    stamp = shards(tmp_path)[0].stat().st_mtime_ns
    one.write(0, 0, rows(1))
    assert shards(tmp_path)[0].stat().st_mtime_ns == stamp, "nothing new, nothing written"
    one.write(0, 0, rows(2, 3))
    assert values(one.read(0), 0, 1, 2, 3).shape == (4, 2)


def test_the_manifest_says_what_the_answers_depend_on(tmp_path: Path) -> None:
    one = store(tmp_path)
    one.write(0, 0, rows(1))
    manifest = json.loads((one.folder / LOGITS_MANIFEST).read_text())
    assert manifest == {"format": 1, **DESCRIPTION}
    assert one.folder.name == f"digits-{one.key}"


@pytest.mark.parametrize(
    "changes",
    [
        {"teacher": {"weights": "abd"}},
        {"data": {"name": "digits", "seed": 1}},
        {"data": {"name": "digits", "seed": 0, "flip": True}},
        {"keeps": {"kind": "top_k", "k": 5}},
    ],
)
def test_another_description_is_another_folder(changes: dict[str, Any], tmp_path: Path) -> None:
    store(tmp_path).write(0, 0, rows(1))
    other = store(tmp_path, **changes)
    assert other.folder != store(tmp_path).folder
    assert other.read(0) is None


def flip_byte(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_change_of_any_byte_is_detected(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whichever byte changes, what is read is nothing, or (a blank of the header) what was written."""
    one = store(tmp_path)
    one.write(0, 0, rows(5, 1, 4))
    (path,) = shards(tmp_path)
    whole, found = path.read_bytes(), 0
    for place in range(len(whole)):
        path.write_bytes(whole)
        flip_byte(path, place)
        kept = one.read(0)
        assert kept is None or torch.equal(values(kept, 1, 4, 5), rows(1, 4, 5).columns["logits"]), place
        found += kept is None
        assert path.exists() == (kept is not None), "what is damaged goes, so that it is made anew"
    assert found > 0.9 * len(whole)
    assert "are damaged" in caplog.text and "made anew" in caplog.text and str(path) in caplog.text


@pytest.mark.parametrize("length", [0, 4, 60, -1])
def test_a_truncated_file_is_made_anew(length: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = store(tmp_path)
    one.write(0, 0, rows(5, 1, 4))
    (path,) = shards(tmp_path)
    path.write_bytes(path.read_bytes()[:length])
    assert one.read(0) is None
    assert len([record for record in caplog.records if "damaged" in record.message]) == 1
    one.write(0, 0, rows(5, 1, 4))
    assert torch.equal(values(one.read(0), 5), rows(5).columns["logits"])


def test_file_of_another_epoch_or_folder_is_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one, other = store(tmp_path), store(tmp_path, teacher={"weights": "other"})
    one.write(0, 0, rows(1))
    (path,) = shards(tmp_path)
    shutil.copy(path, path.with_name("epoch-00001.rank0.safetensors"))
    other.folder.mkdir()
    shutil.copy(path, other.folder / path.name)
    assert one.read(1) is None
    assert other.read(0) is None
    assert caplog.text.count("its checksum is wrong") == 2
    assert one.read(0) is not None


@pytest.mark.parametrize("content", [b"{}", b"\xff\xfe\x00"])
def test_a_wrong_manifest_is_written_anew(content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = store(tmp_path)
    one.write(0, 0, rows(1))
    right = (one.folder / LOGITS_MANIFEST).read_bytes()
    (one.folder / LOGITS_MANIFEST).write_bytes(content)
    one.write(0, 0, rows(2))
    assert (one.folder / LOGITS_MANIFEST).read_bytes() == right
    assert "it is written anew" in caplog.text
    assert values(one.read(0), 1, 2).shape == (2, 2), "files answer for themselves"


def test_concurrent_writers_leave_whole_files(tmp_path: Path) -> None:
    """Two trials of one sweep: the same folder, the same epochs, the same rank, at the same time."""
    failures: list[BaseException] = []

    def trial(start: int) -> None:
        try:
            for epoch in range(20):
                store(tmp_path).write(epoch, 0, rows(*range(start, start + 50)))
                kept = store(tmp_path).read(epoch)
                assert torch.equal(values(kept, start), rows(start).columns["logits"])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=trial, args=(0,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert list(tmp_path.rglob("*.tmp")) == []
    assert len(shards(tmp_path)) == 20


def test_partial_files_of_killed_writers_are_removed(tmp_path: Path) -> None:
    one = store(tmp_path)
    one.write(0, 0, rows(1))
    old, fresh = one.folder / ".epoch-1.old.tmp", one.folder / ".epoch-1.fresh.tmp"
    for path in (old, fresh):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    one.write(1, 0, rows(1))
    assert not old.exists() and fresh.exists()


def test_failed_write_raises_and_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = store(tmp_path)
    one.write(0, 0, rows(1))

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left on the disk of"):
        one.write(0, 0, rows(2))
    monkeypatch.undo()
    assert list(one.folder.glob(".*")) == []
    assert torch.equal(values(one.read(0), 1), rows(1).columns["logits"])
