"""The arithmetic of the sweep's benchmark, and its one-line refusals; the sweep itself is tests/tasks/sweeping's."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from qtrain.sweep.trial import Trial
from tests.helpers.script import load_script


@pytest.fixture(scope="module")
def bench(repo: Path) -> ModuleType:
    return load_script("bench_sweep")


def trial(id: str, started: float, ended: float, train_s: float) -> Trial:
    return Trial(
        id=id,
        key=id,
        status="finished",
        started=started,
        ended=ended,
        train_s=train_s,
        overhead_s=ended - started - train_s,
    )


def test_overhead_is_all_but_the_fit(bench: ModuleType) -> None:
    trials = [trial("b", 21.0, 26.0, 4.5), trial("a", 10.0, 20.0, 3.0), trial("c", 26.25, 30.25, 3.75)]
    found = bench.overhead_of([*trials, Trial(id="d", key="d", status="failed", started=1.0)])
    assert found.cold_s == pytest.approx(7.0)
    assert found.between_s == pytest.approx([1.0, 0.25])
    assert found.around_s == pytest.approx([0.5, 0.25])
    # From the end of the first to the end of the last, without the fits of the two that came in between.
    assert sum(found.total_s) == pytest.approx(30.25 - 20.0 - 4.5 - 3.75)


def test_one_trial_is_too_few(bench: ModuleType) -> None:
    with pytest.raises(ValueError, match="1 trials have finished"):
        bench.overhead_of([trial("a", 1.0, 2.0, 0.5)])


def test_a_wrong_option_is_one_line(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["sweep.trials=0"]) == 2
    assert "bench_sweep: error: sweep.trials: must be at least 1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench.main(["--trials", "1"])
