"""What the driver of a sweep writes down of trials that could not tell of their end, and when a sweep ends."""

from __future__ import annotations

import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qtrain.sweep.engine import EndOfSweep, Record, told
from qtrain.sweep.run_trial import Proposal
from qtrain.sweep.trial import Trial

METRICS = {"top1": 50.0, "epochs": 2.0}


class Table:
    """Keeps the ids of the trials that it was told are running."""

    running: tuple[str, ...] = ()

    def update(self, trials: list[Trial], running: list[Any]) -> None:
        self.running = tuple(run.id for run in running)


@pytest.fixture
def trials() -> list[Trial]:
    return []


@pytest.fixture
def table() -> Table:
    return Table()


@pytest.fixture
def record(tmp_path: Path, trials: list[Trial], table: Table) -> Record:
    proposals: Any = SimpleNamespace(proposals={"0001": Proposal(id="0001", key="abc", knobs={"seed": 1})})
    return Record(
        proposals=proposals, folder=tmp_path, record=trials.append, trials=lambda: trials, table=table,
        epochs=4, threads=3, every_s=0,
    )  # fmt: skip


def of_ray(error: Exception | None = None, failures: int = 1) -> Any:
    """What Ray hands to a callback for the proposal above."""
    return SimpleNamespace(
        config={"proposal": {"id": "0001", "key": "abc", "knobs": {"seed": 1}}},
        last_result=told(METRICS),
        num_failures=failures,
        get_pickled_error=lambda: error,
    )


def begin(record: Record) -> None:
    record.on_trial_start(0, [], of_ray())
    record.on_trial_result(0, [], of_ray(), told(METRICS))
    record.on_step_end(0, [])


@pytest.mark.parametrize(
    ("error", "failures", "reason"),
    [
        (None, 1, "its worker died"),
        (None, 3, "its worker died (3 times)"),
        (ValueError("too\nlarge"), 1, "too large"),
        (RuntimeError("x" * 400), 1, f"RuntimeError: {'x' * 285}…"),
    ],
)
def test_trial_that_breaks_off_is_failed_with_its_reason(
    record: Record, trials: list[Trial], table: Table, error: Exception | None, failures: int, reason: str
) -> None:
    begin(record)
    assert table.running == ("0001",)
    record.on_trial_error(0, [], of_ray(error, failures))
    (trial,) = trials
    assert (trial.id, trial.key, trial.status, trial.reason) == ("0001", "abc", "failed", reason)
    assert trial.knobs == {"seed": 1} and trial.threads == 3 and trial.metrics == {}
    assert table.running == ()


def test_trial_without_end_of_its_own_was_stopped_by_the_scheduler(record: Record, trials: list[Trial]) -> None:
    begin(record)
    record.on_trial_complete(0, [], of_ray())
    (trial,) = trials
    assert trial.status == "stopped" and "scheduler" in str(trial.reason)
    assert (trial.epochs, trial.metrics) == (2.0, {"top1": 50.0})


def test_trials_that_end_with_the_sweep_keep_what_they_reported(record: Record, trials: list[Trial]) -> None:
    begin(record)
    record.unfinished("the time budget was over")
    (trial,) = trials
    assert (trial.status, trial.reason) == ("stopped", "the time budget was over")
    assert (trial.epochs, trial.metrics) == (2.0, {"top1": 50.0})


def test_ray_is_given_nothing_of_the_record_to_write_down(record: Record) -> None:
    assert record.__getstate__() == {}


def test_sweep_ends_after_its_time_or_a_signal() -> None:
    assert not EndOfSweep(None).stop_all() and not EndOfSweep(1000).stop_all()
    over = EndOfSweep(0)
    assert over.out_of_time and over.stop_all() and not over("0001", {})
    told_to = EndOfSweep(None)
    with told_to.note:
        signal.raise_signal(signal.SIGTERM)
    assert told_to.signum is signal.SIGTERM and told_to.stop_all()
