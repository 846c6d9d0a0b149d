"""What takes time beside steps is measured in passes of full precision. No assertion on time."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from qtrain.pipeline.results import read_results
from tests.helpers.graphs import counts_graphs
from tests.helpers.script import load_script

TINY = ["--batch", "4", "--size", "8", "--rounds", "1", "model=cifar_resnet8", "model.width=0.25"]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Compiles to one graph, without the time that kernels take."""
    counts_graphs(monkeypatch)
    return load_script("bench_phases")


def test_each_phase_becomes_a_row_in_units_of_a_pass(script: ModuleType, tmp_path: Path) -> None:
    csv = tmp_path / "bench.csv"
    assert script.main([*TINY, "--results", str(csv)]) == 0
    first, *others = read_results(csv)
    assert first["case"] == "full precision" and not first["ratio"]
    assert [row["case"] for row in others] == [
        "evaluation of the student", "evaluation of the student, compiled", "conversion and calibration",
        "Fisher scores", "traces, 2 probes", "AdaRound, 10 steps", "BRECQ, 10 steps", "synthesis, 10 steps",
    ]  # fmt: skip
    assert all(float(row["ratio"]) > 0 for row in others)
    assert [row["case"] for row in others if row["mode"] == "compiled"] == ["evaluation of the student, compiled"]
    what = {tuple(row[name] for name in ("task", "model", "quantizer", "w_bits", "a_bits")) for row in [first, *others]}
    assert what == {("bench_phases", "cifar_resnet8", "lsq", "4", "4")}


def test_phases_can_be_chosen_and_a_wrong_choice_is_one_line(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main([*TINY, "--phases", "evaluation", "conversion"]) == 0
    table = capsys.readouterr().out
    assert "conversion and calibration" in table and "BRECQ" not in table
    assert script.main([*TINY, "--phases", "evaluation", "quantize.bits.weight=2"]) == 2
    assert "no phase begins with 'quantize.bits.weight=2'; there are full precision, eval" in capsys.readouterr().err
    assert script.main([*TINY, "fit.epoch=3"]) == 2
    assert capsys.readouterr().err.startswith("bench_phases: error: unknown key 'fit.epoch'")
