"""Files that appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

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
