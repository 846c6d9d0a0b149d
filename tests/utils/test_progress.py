"""Progress of long work: in a log file a line now and then, and every thing arrives."""

from __future__ import annotations

import logging

import pytest

from qtrain.utils import progress
from qtrain.utils.progress import tracked


def clock(monkeypatch: pytest.MonkeyPatch, step_s: float) -> None:
    """Time goes on by ``step_s`` each time one looks."""
    now = iter(range(10**6))
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(now) * step_s)


def test_a_line_every_ten_seconds_says_rate_and_time_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock(monkeypatch, 2.5)
    with caplog.at_level(logging.INFO, "qtrain"):
        assert list(tracked("abcdefgh", total=8, title="reading", unit="files", bar=False)) == list("abcdefgh")
    assert caplog.messages == [
        "reading: 4/8 files  0 files/s  10 s left",
        "reading: 8/8 files  0 files/s  0 s left",
    ]


def test_a_bar_shows_the_same_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock(monkeypatch, 1.0)
    monkeypatch.setenv("FORCE_COLOR", "1")
    seen = []
    for thing in tracked(range(3), total=3, title="reading", unit="files", bar=True):
        seen.append(thing)
    assert seen == [0, 1, 2]
    assert "reading" in capsys.readouterr().err


def test_work_that_ends_early_closes_the_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="stop"):
        for _ in tracked(range(3), total=3, title="reading", unit="files", bar=True):
            raise RuntimeError("stop")
    for _ in tracked(range(1), total=1, title="again", unit="files", bar=True):
        pass  # rich refuses a second bar while one is shown on the same console
