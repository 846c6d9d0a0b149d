"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from qtrain.utils import atomic_write as module
from qtrain.utils.atomic_write import atomic_write, growing_file, partial_of, write_text


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError, match="killed"), atomic_write(path) as temporary:
        temporary.write_text("half")
        assert path.read_text() == "old"
        raise RuntimeError("killed")
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_two_writers_at_once_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with atomic_write(path) as first, atomic_write(path) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"  # the outer block ended last
    assert list(tmp_path.iterdir()) == [path]


def test_a_growing_file_has_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.csv"
    with pytest.raises(RuntimeError, match="killed"), growing_file(path) as file:
        file.write("one\n")
        assert partial_of(path).read_text() == "one\n", "a line is out when it is whole"
        raise RuntimeError("killed")
    assert list(path.parent.iterdir()) == [partial_of(path)]
    with growing_file(path) as file:
        file.write("two\r\n\udcff\n")
    assert path.read_bytes() == b"two\r\n\xff\n"
    assert list(path.parent.iterdir()) == [path]


def written_at_once(path: Path) -> None:
    write_text(path, "whole")


def written_line_by_line(path: Path) -> None:
    with growing_file(path) as file:
        file.write("whole")


@pytest.mark.parametrize("write", [written_at_once, written_line_by_line])
def test_file_reaches_the_disk_before_its_name_and_the_folder_after_it(
    write: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is asked of the operating system, in order; after a power cut the name would else lead to an empty file."""
    asked: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        place = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        asked.append(("to disk", "the folder" if place == tmp_path else place.read_text()))
        fsync(descriptor)

    def noted_replace(source: Path, target: Path) -> None:
        assert source.parent == target.parent, "another file system would copy"
        asked.append(("rename", target.name))
        replace(source, target)

    monkeypatch.setattr(module.os, "fsync", noted_fsync)
    monkeypatch.setattr(module.os, "replace", noted_replace)
    write(tmp_path / "a.txt")
    assert asked == [("to disk", "whole"), ("rename", "a.txt"), ("to disk", "the folder")]


@pytest.mark.parametrize("write", [written_at_once, written_line_by_line])
def test_file_system_that_opens_no_folder_loses_nothing(
    write: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_file = os.open

    def refuses_folders(path: Path, flags: int) -> int:
        if Path(path).is_dir():
            raise OSError(22, "Invalid argument")
        return open_file(path, flags)

    monkeypatch.setattr(module.os, "open", refuses_folders)
    write(tmp_path / "a.txt")
    assert (tmp_path / "a.txt").read_text() == "whole"


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "pipe", tmp_path / "folder", Path(os.devnull)):
        with pytest.raises(ValueError, match="not a file; give another path"), atomic_write(path) as temporary:
            temporary.write_text("new")
        with pytest.raises(ValueError, match="not a file"), growing_file(path):
            pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "pipe"]
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode) and (tmp_path / "pipe").is_fifo()


def test_a_link_stays_and_what_it_leads_to_is_written(tmp_path: Path) -> None:
    real, link = tmp_path / "there" / "real.txt", tmp_path / "link.txt"
    real.parent.mkdir()
    link.symlink_to(real)
    for text in ("first", "second"):
        write_text(link, text)
        assert link.is_symlink() and real.read_text() == text
    with growing_file(link) as file:
        file.write("third")
    assert link.is_symlink() and real.read_text() == "third"
