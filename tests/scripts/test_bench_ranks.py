"""What ranks gain: cases in turn, their medians, and rows that say where they come from."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from qtrain.pipeline.results import read_results
from tests.helpers.script import load_script


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return load_script("bench_ranks")


def test_ratios_are_to_one_rank_and_rows_are_kept(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    times = {(1, 1): 0.4, (1, 2): 0.3, (2, 1): 0.2}
    asked = []

    def step(case: bench.Case, chosen: list[str]) -> float:  # type: ignore[name-defined]
        asked.append(case.name)
        return times[case.ranks, case.threads] * (2 if len(asked) <= 4 else 1)  # the first round is slow

    monkeypatch.setattr(bench, "_step_s", step)
    assert bench.main(["data=digits", "model=cifar_resnet8", "--results", str(tmp_path / "r.csv")]) == 0
    assert asked == asked[:4] * 3
    rows = read_results(tmp_path / "r.csv")
    assert [float(row["ratio"]) for row in rows] == pytest.approx([1, 0.75, 0.5, 1])
    assert {row["hardware"] for row in rows} and rows[2]["case"] == "2 ranks, one thread each"
    assert "2 ranks, one thread each" in capsys.readouterr().out


@pytest.mark.slow
def test_a_step_is_measured_in_a_run_of_its_own(bench: ModuleType) -> None:
    small = ["data=digits", "model=cifar_resnet8", "data.max_train=192", "data.batch_size=16", "data.max_test=32"]
    case = bench.Case("one", 1, 1, bench.NEVER)
    assert 1e-4 < bench._step_s(case, [*small, "full_precision.epochs=1", "model.width=0.25"]) < 60
