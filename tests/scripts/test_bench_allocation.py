"""The benchmark of searches: its problem is a network's, its rows say what was found and how long it took."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from qtrain.pipeline.results import read_results
from tests.helpers.script import load_script


@pytest.fixture(scope="module")
def bench(repo: Path) -> ModuleType:
    return load_script("bench_allocation")


def test_the_problem_has_the_layers_and_costs_of_the_network(bench: ModuleType) -> None:
    """ResNet-8 of CIFAR, with 74,800 weights of 4 bits; the stem multiplies 32 x 32 x 16 x 27 times."""
    problem = bench.problem_of("cifar_resnet8", 0)
    assert len(problem.options) == 8
    assert all(len(options) == 36 for options in problem.options.values())
    weights = 16 * 27 + 2 * 16 * 16 * 9 + 32 * 16 * 9 + 32 * 32 * 9 + 64 * 32 * 9 + 64 * 64 * 9 + 10 * 64
    assert problem.budgets["size_bytes"] == weights * 4 / 8
    assert problem.costs["bops"].layers["conv1"][bench.UNIFORM] == 32 * 32 * 16 * 27 * 16
    assert problem.scores.weight["conv1"][2] == pytest.approx(4**6 * problem.scores.weight["conv1"][8])


def test_each_search_and_the_question_of_a_cost_become_rows(bench: ModuleType, tmp_path: Path) -> None:
    assert bench.main(["--models", "cifar_resnet8", "--rounds", "1", "--results", str(tmp_path / "solve.csv")]) == 0
    rows = {row["case"]: row for row in read_results(tmp_path / "solve.csv")}
    assert list(rows) == ["integer program", "Pareto", "size of an allocation"]
    assert all(float(row["processor_s"]) > 0 for row in rows.values())
    assert float(rows["integer program"]["score_ratio"]) == pytest.approx(
        float(rows["Pareto"]["score_ratio"]), rel=1e-3
    )
    assert float(rows["Pareto"]["score_ratio"]) < 1


def test_a_wrong_option_is_one_line(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["--rounds", "0"])
    assert "--rounds must be at least 1, got 0" in capsys.readouterr().err
