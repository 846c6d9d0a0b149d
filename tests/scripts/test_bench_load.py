"""What loading takes: medians over processes, and rows that say where they come from."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from qtrain.pipeline.results import read_results
from tests.helpers.script import load_script


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return load_script("bench_load")


def test_row_has_medians_and_their_ratios_to_the_float_network(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loads, builds = iter([(0.9, 5e5), (0.3, 3e5), (0.2, 1e5)]), iter([(0.1, 2e5), (0.2, 2e5), (0.1, 3e5)])
    monkeypatch.setattr(bench, "_in_a_process", lambda network, file, threads: next(loads if file else builds))
    results = tmp_path / "load.csv"
    chosen = ["--models", "cifar_resnet8", "--rounds", "3", "--results", str(results)]
    assert bench.main(chosen) == 0
    (row,) = read_results(results)
    assert (float(row["load_s"]), float(row["build_s"]), float(row["ratio"])) == pytest.approx((0.3, 0.1, 3))
    assert float(row["memory"]) == pytest.approx(3e5 / int(row["fp_size_bytes"]), rel=1e-4)
    assert int(row["size_bytes"]) < int(row["file_bytes"]) < int(row["fp_size_bytes"])
    assert row["commit"] and row["hardware"]
    assert "300.0 ms,  3.00 of building" in capsys.readouterr().out


def test_a_choice_that_does_not_exist_is_one_line(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--models", "cifar_resnet8", "--weight", "nothing"]) == 2
    assert capsys.readouterr().err.startswith("bench_load: error: ")


@pytest.mark.slow
def test_seconds_and_bytes_are_measured_in_processes_of_their_own(bench: ModuleType, tmp_path: Path) -> None:
    results = tmp_path / "load.csv"
    assert bench.main(["--models", "cifar_resnet8", "--rounds", "1", "--results", str(results)]) == 0
    (row,) = read_results(results)
    assert 1e-4 < float(row["load_s"]) < 60
    assert int(row["load_bytes"]) > int(row["fp_size_bytes"]) if sys.platform == "linux" else True
