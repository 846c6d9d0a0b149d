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
        "reading: 4/8 files  0.4 files/s  10 s left",
        "reading: 8/8 files  0.4 files/s  0 s left",
    ]


def test_a_bar_gives_every_thing_and_may_end_early() -> None:
    assert list(tracked(range(3), total=3, title="reading", unit="files", bar=True)) == [0, 1, 2]
    with pytest.raises(RuntimeError, match="stop"):
        for _ in tracked(range(3), total=3, title="reading", unit="files", bar=True):
            raise RuntimeError("stop")
