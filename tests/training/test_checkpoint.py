"""Checkpoint files: whole or not there, plain data only, and clear words about damaged ones."""

from __future__ import annotations

import logging
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from qtrain.training import checkpoint
from qtrain.training.checkpoint import (
    AtomicCheckpointIO,
    find_resume_point,
    list_resume_points,
    read_checked,
    remove_unfinished,
    resume_point_name,
    write_atomically,
)

STATE = {
    "state_dict": {"student.weight": torch.arange(3000.0)},
    "loops": {},
    "optimizer_states": [],
    "lr_schedulers": [],
    "global_step": 5,
}


class Custom:
    """A class that must not get into a checkpoint."""


def points(folder: Path, *steps: int) -> list[Path]:
    for step in steps:
        write_atomically(STATE, folder / resume_point_name(step))
    return [path for _, path in list_resume_points(folder)]


def test_checkpoint_round_trip_keeps_the_state(tmp_path: Path) -> None:
    io = AtomicCheckpointIO()
    io.save_checkpoint(STATE, tmp_path / "new" / "a.ckpt")
    loaded = io.load_checkpoint(tmp_path / "new" / "a.ckpt")
    assert torch.equal(loaded["state_dict"]["student.weight"], STATE["state_dict"]["student.weight"])  # type: ignore[index]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.ckpt"]
    io.remove_checkpoint(tmp_path / "new" / "a.ckpt")
    io.remove_checkpoint(tmp_path / "new" / "a.ckpt")  # again: not an error
    assert not list((tmp_path / "new").iterdir())


def test_file_and_folder_reach_the_disk_before_and_after_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        order.append("folder" if Path(os.readlink(f"/proc/self/fd/{descriptor}")).is_dir() else "file")
        fsync(descriptor)

    def noted_replace(source: str, target: Path) -> None:
        assert Path(source).parent == target.parent  # another file system would copy
        order.append("rename")
        replace(source, target)

    monkeypatch.setattr(checkpoint.os, "fsync", noted_fsync)
    monkeypatch.setattr(checkpoint.os, "replace", noted_replace)
    write_atomically(STATE, tmp_path / "a.ckpt")
    assert order == ["file", "rename", "folder"]


def test_failing_write_keeps_the_old_file_and_leaves_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.ckpt"
    write_atomically(STATE, path)
    before = path.read_bytes()

    def full_disk(state: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", full_disk)
    with pytest.raises(OSError, match="no space left on the disk"):
        write_atomically(STATE, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_state_with_class_objects_is_refused_when_saving(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"plain data only.*Custom"):
        write_atomically({**STATE, "hyper_parameters": {"x": Custom()}}, tmp_path / "a.ckpt")
    assert not list(tmp_path.iterdir())


def damage_truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-500])


def damage_empty(path: Path) -> None:
    path.write_bytes(b"")


def damage_one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def damage_text(path: Path) -> None:
    path.write_text("<html>not found</html>")


def damage_pickled_class(path: Path) -> None:
    torch.save({**STATE, "x": Custom()}, path)


def damage_other_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme", "hello")


def damage_not_a_dict(path: Path) -> None:
    torch.save([1, 2], path)


DAMAGES = {
    damage_truncated: "truncated or not a checkpoint",
    damage_empty: "truncated or not a checkpoint",
    damage_one_bit: "wrong checksum|truncated",
    damage_text: "truncated or not a checkpoint",
    damage_pickled_class: "pickled classes",
    damage_other_zip: "foreign",
    damage_not_a_dict: "holds a list",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_files_are_logged_in_one_line_and_skipped(
    damage: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    older, newest = points(tmp_path, 5, 10)
    damage(newest)
    with pytest.raises(ValueError, match=DAMAGES[damage]) as caught:
        AtomicCheckpointIO().load_checkpoint(newest)
    assert str(newest) in str(caught.value) and "resume=false" in str(caught.value)
    assert "\n" not in str(caught.value)
    with caplog.at_level(logging.WARNING):
        assert find_resume_point(tmp_path) == older
    assert str(newest) in caplog.text


def test_a_weights_file_is_no_resume_point(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_atomically({"state_dict": {}}, tmp_path / resume_point_name(7))
    assert find_resume_point(tmp_path) is None
    assert "lacks" in caplog.text


def test_steps_are_compared_as_numbers_and_other_files_are_left_out(tmp_path: Path) -> None:
    points(tmp_path, 99_999_999, 100_000_000, 20)
    (tmp_path / "notes.ckpt").write_text("")
    assert [step for step, _ in list_resume_points(tmp_path)] == [20, 99_999_999, 100_000_000]
    assert find_resume_point(tmp_path) == tmp_path / "step-100000000.ckpt"
    assert find_resume_point(tmp_path / "absent") is None


def test_unfinished_files_are_no_resume_points_and_are_deleted(tmp_path: Path) -> None:
    (whole,) = points(tmp_path, 3)
    (tmp_path / ".step-00000006.ckpt.abc.tmp").write_bytes(b"half")
    assert find_resume_point(tmp_path) == whole
    remove_unfinished(tmp_path)
    assert list(tmp_path.iterdir()) == [whole]


def test_checkpoint_io_refuses_misuse(tmp_path: Path) -> None:
    io = AtomicCheckpointIO()
    with pytest.raises(FileNotFoundError, match=r"absent\.ckpt does not exist"):
        read_checked(tmp_path / "absent.ckpt")
    with pytest.raises(ValueError, match="only ever read with weights_only=True"):
        io.load_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    with pytest.raises(ValueError, match="storage_options"):
        io.save_checkpoint(STATE, tmp_path / "a.ckpt", storage_options={})


def test_resume_points_of_earlier_versions_are_found(tmp_path: Path) -> None:
    """Their names had an equals sign, which the command line takes in quotes only."""
    (new,) = points(tmp_path, 3)
    old = new.rename(tmp_path / "step=00000003.ckpt")
    assert "=" not in new.name
    assert list_resume_points(tmp_path) == [(3, old)]
