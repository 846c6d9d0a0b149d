"""A sweep while it goes on: what lines and table say, what is left, what was spent."""

from __future__ import annotations

import doctest
import io
import re
from dataclasses import replace

import pytest

from qtrain.config import experiment_file
from qtrain.report import formatting
from qtrain.report.formatting import bits_text, knobs_text, uniform_bits
from qtrain.report.live_table import MOST_FRONT, LiveTable, ended_line, print_front
from qtrain.sweep import sweep_results
from qtrain.sweep.running import Running
from qtrain.sweep.spending import full_epochs, spending
from qtrain.sweep.trial import Trial

OBJECTIVES = {"top1": "max", "size_bytes": "min"}


def trial(
    number: int, status: str = "finished", *, top1: float = 90.0, size: float = 5000.0, **changes: object
) -> Trial:
    fields = dict(
        id=f"{number:04d}", key=f"k{number}", status=status, metrics={"top1": top1, "size_bytes": size}, epochs=4.0,
        layer_bits={"conv1": [8, 8], "a": [3, 4], "b": [3, 4], "fc": [8, 8]}, knobs={"optimizer.lr": 0.01},
        overhead_s=0.4, train_s=10.0, started=100.0 * number, ended=100.0 * number + 50,
    )  # fmt: skip
    return Trial(**(fields | changes))  # type: ignore[arg-type]


class Terminal(io.StringIO):
    """A text that says it is a terminal."""

    def isatty(self) -> bool:
        return True


class Clock:
    """Tells ``now``."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_lines_report_each_trial_once_and_the_sweep_at_intervals() -> None:
    file, clock = io.StringIO(), Clock()
    table = LiveTable(
        title="sweep",
        objectives=OBJECTIVES,
        epochs=4,
        trials=6,
        file=file,
        every_s=30,
        clock=clock,
        space=["optimizer.lr"],
    )
    known = [trial(1, top1=80.0)]
    table.update(known)
    clock.now += 10
    done = [*known, trial(2, size=6000.0)]
    table.update(done, [Running(id="0003", knobs={})])
    table.update(done)
    clock.now += 30
    table.update([*done, trial(3, "failed", reason="out of memory", metrics={}), trial(4, "duplicate", of="0002")])
    assert file.getvalue().splitlines() == [
        "sweep: 1 of 6 trials, 0 s, 4 epochs spent, full training of all 4 (100%); on the front 1",
        "trial 2 of 6 finished: 4 epochs, val top-1 90.00 %, size 6.0 kB, W3A4, on the front; lr=0.01",
        "trial 3 of 6 failed: 4 epochs, W3A4, out of memory; lr=0.01",
        "trial 4 of 6 duplicate: of 0002; lr=0.01",
        # Three trials in 40 s: two more take 27 s. Four trials are 16 epochs in full; a duplicate spends none.
        "sweep: 4 of 6 trials (1 failed, 1 duplicate), 40 s, about 27 s left, 12 epochs spent, full training of all 16 "
        "(75%); on the front 2",
    ]


def test_time_left_is_limited_by_trials_or_by_the_budget() -> None:
    """Ten trials of 100 s are left; of an hour 200 s, since an earlier command had spent 3300 s."""
    for budget, spent, left in ((None, 0.0, "about 16:40 left"), (3600.0, 3300.0, "about 3:20 left")):
        file, clock = io.StringIO(), Clock()
        table = LiveTable(title="s", objectives=OBJECTIVES, epochs=4, trials=12, time_budget_s=budget, spent_s=spent,
                          file=file, every_s=1, clock=clock)  # fmt: skip
        table.update([trial(1)])
        clock.now += 100
        table.update([trial(1), trial(2)])
        assert left in file.getvalue().splitlines()[-1]


def test_terminal_shows_running_trials_and_the_front(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    file, clock = Terminal(), Clock()
    running = [
        Running(id="0003", knobs={"w.a": 4, "w.b": 2}, epoch=1, epochs=4, metrics={"top1": 71.5}, started=940.0),
        Running(id="0004"),
    ]
    with LiveTable(
        title="my sweep", objectives=OBJECTIVES, epochs=4, trials=6, file=file, clock=clock, space=["w"]
    ) as table:
        table.update([trial(1), trial(2, top1=50.0, size=9000.0)], running)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert any(row.startswith("my sweep 2 of 6 trials, 2 running") for row in rows)
    assert "1/4 71.50 1:00 w=4 2" in rows and "0 waits" in rows
    assert "1 90.00 5.0 kB W3A4 lr=0.01" in rows
    assert not any("50.00" in row for row in rows)  # beaten
    assert "\x1b[?25h" in file.getvalue()  # the cursor is shown again


def test_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    file = Terminal()
    LiveTable(title="s", objectives=OBJECTIVES, epochs=4, file=file).update([])
    assert file.getvalue().startswith("s: 0 trials")


def test_long_front_is_cut_in_the_live_table_and_printed_whole_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    trials = [trial(n, top1=50.0 + n, size=1000.0 * n) for n in range(1, 31)]
    file, last = Terminal(), io.StringIO()
    with LiveTable(title="s", objectives=OBJECTIVES, epochs=4, file=file) as table:
        table.update(trials)
    assert f"{MOST_FRONT} of 30" in file.getvalue()
    print_front(trials, OBJECTIVES, file=last)
    assert len(last.getvalue().splitlines()) == 32 and "80.00" in last.getvalue() and "51.00" in last.getvalue()


def test_front_without_trials_is_one_line() -> None:
    file = io.StringIO()
    print_front([trial(1, "failed")], OBJECTIVES, file=file)
    assert file.getvalue() == "front: no trial has finished\n"


def test_ended_line_gives_the_reason_last() -> None:
    line = ended_line(trial(1, "stopped", reason="by the scheduler"), OBJECTIVES, on_front=False)
    assert line == "stopped: 4 epochs, val top-1 90.00 %, size 5.0 kB, W3A4, by the scheduler"


def test_spending_counts_epochs_and_seconds() -> None:
    """Epochs of runs over those that all trials, duplicates too, would have taken; a trial may have chosen its own."""
    trials = [
        trial(1), trial(2, "stopped", epochs=1.0, overhead_s=0.0), trial(3, "failed", epochs=0.5, overhead_s=9.0),
        trial(4, "duplicate", epochs=0.0, of="0001", ended=1e9),
        trial(5, epochs=8.0, overrides=["fit.epochs=2", "fit.epochs=8"], overhead_s=0.6),
    ]  # fmt: skip
    spent = spending(trials, 4)
    assert (spent.epochs, spent.full_epochs) == (13.5, 4 * 4 + 8) and spent.share == 13.5 / 24
    assert spent.overhead_median_s == 0.5 and spent.wall_s == 4 * 50.0 and spent.train_s == 40.0
    assert spent.counted() == "5 trials: 2 finished, 1 stopped, 1 failed, 1 duplicate"
    # Of two runs with an interruption in between, the time in which some trial ran: 2 to 5 and 900 to 910.
    later = [trial(1, started=2.0, ended=4.0), trial(2, started=3.0, ended=5.0), trial(3, started=900.0, ended=910.0)]
    assert spending(later, 4).wall_s == 13.0
    assert spending([], 4).share == 0 and spending([], 4).counted() == "0 trials"
    assert full_epochs(replace(trials[0], overrides=["+fit.epochs=3"]), 4) == 3


@pytest.mark.parametrize(
    ("widths", "text"),
    [
        ({"conv1": [8, 8], "a": [2, 2], "b": [2, 2], "fc": [8, 8]}, "W2A2"),
        ({"conv1": [8, 8], "a": [2, 4], "b": [3, 4], "fc": [8, 8]}, "W2.5A4.0"),
        ({"conv1": [32, 32], "a": [32, 32], "fc": [32, 32]}, "full precision"),
        ({"a": [4, 4], "fc": [2, 2]}, "W3.0A3.0"),
        ({}, ""),
    ],
)
def test_bits_text_is_uniform_bits_or_means(widths: dict[str, list[int]], text: str) -> None:
    assert bits_text(trial(1, layer_bits=widths)) == text
    assert (uniform_bits(trial(1, layer_bits=widths)) is None) == ("." in text or not text)


def test_bits_leave_out_all_layers_at_the_ends() -> None:
    """Two heads, and a branch that reads the image in the middle of the order."""
    widths = {"stem": [8, 8], "a": [2, 2], "branch": [8, 8], "b": [2, 2], "head": [8, 8], "head_dist": [8, 8]}
    ends = ["stem", "branch", "head", "head_dist"]
    assert bits_text(trial(1, layer_bits=widths, ends=ends)) == "W2A2"
    assert bits_text(trial(1, layer_bits=widths)) == "W5.0A5.0", "of a trial of an earlier version"


def test_knobs_text_is_cut_at_its_width() -> None:
    text = knobs_text({f"w.layer{n}": 4 for n in range(40)} | {"optimizer.lr": 0.1, "a.lr": 0.2}, ["w"])
    assert text.startswith("w=4 4 4") and "…" in text and len(text) <= formatting.KNOBS_WIDTH


def test_whole_numbers_keep_their_digits_and_data_is_not_rounded() -> None:
    knobs = {"a.seed": 20240101, "b.lr": 0.0001234567, "c.words": "x" * 40, "d.bits": [12345, 4]}
    assert knobs_text(knobs, knobs) == "seed=20240101 lr=0.0001235 words=" + "x" * 26 + "…"
    assert knobs_text(knobs, knobs, width=None) == ("seed=20240101 lr=0.0001234567 words=" + "x" * 40 + " bits=12345 4")


def test_examples_in_docstrings_hold() -> None:
    for module in (formatting, experiment_file, sweep_results):
        result = doctest.testmod(module)
        assert result.attempted > 0 and result.failed == 0


def test_live_table_refuses_an_interval_of_zero() -> None:
    with pytest.raises(ValueError, match="every_s must be positive, got 0"):
        LiveTable(title="s", objectives=OBJECTIVES, epochs=1, every_s=0)
