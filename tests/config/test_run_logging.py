from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from qtrain.config.run_logging import logged_in
from qtrain.pipeline.run_lock import only_run_in
from qtrain.settings.run_files import LOCK
from qtrain.utils.errors import ConfigError


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Lets another process write into a folder in the very moment in which this one has made it."""
    real = Path.mkdir

    def mkdir(folder: Path, *args: Any, **kwargs: Any) -> None:
        real(folder, *args, **kwargs)
        monkeypatch.setattr(Path, "mkdir", real)
        (folder / LOCK).touch()

    monkeypatch.setattr(Path, "mkdir", mkdir)


def test_what_another_rank_writes_meanwhile_does_no_harm(tmp_path: Path, beside: Any) -> None:
    with logged_in(tmp_path / "run"):
        pass
    assert (tmp_path / "run" / LOCK).is_file()


def test_a_folder_that_was_made_stays_for_the_ranks_that_have_seen_it(tmp_path: Path) -> None:
    with logged_in(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()


def test_a_refused_run_leaves_no_folder(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "run"
    with pytest.raises(ConfigError, match="no such layer"), logged_in(folder), only_run_in(folder):
        raise ConfigError("no such layer")
    assert not (tmp_path / "deep").exists()


def test_the_holder_keeps_its_folder_when_another_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    second = logged_in(folder)
    second.__enter__()
    with only_run_in(folder):
        refused = ConfigError("run_dir: in use")
        assert not second.__exit__(ConfigError, refused, None)
        assert (folder / LOCK).is_file()


def test_another_rank_may_make_the_folder_between_two_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, folder = Path.stat, tmp_path / "run"

    def stat(path: Path, **options: Any) -> Any:
        try:
            return real(path, **options)
        except FileNotFoundError:
            folder.mkdir(exist_ok=True)
            raise

    monkeypatch.setattr(Path, "stat", stat)
    with logged_in(folder):
        assert list(folder.iterdir()) == []


def test_a_name_too_long_for_a_folder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot make .*x \(File name too long\)"), logged_in(tmp_path / ("x" * 300)):
        pytest.fail("it began")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def mkdir(*_: Any, **__: Any) -> None:
        raise OSError(number, "no room")

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(ConfigError, match=r"cannot make .*run \(no room\)"), logged_in(tmp_path / "run"):
        pytest.fail("it began")
