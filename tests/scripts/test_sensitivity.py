"""The table of scores: rank correlations with what is measured."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from scipy.stats import spearmanr

from qtrain.sensitivity.base import Score
from qtrain.spec import Scores
from tests.helpers.script import load_script

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("sensitivity")


def scores(script: ModuleType, factor: float) -> Scores:
    table = {f"layer{i}": {bits: (i + 1) ** factor / bits for bits in script.BITS} for i in range(5)}
    return Scores(table, table)


def test_correlations_are_of_layers_at_each_width_and_of_all_widths(script: ModuleType) -> None:
    rows = list(script.correlations(scores(script, 1.0), {"kl": scores(script, 2.0), "loss": scores(script, -1.0)}))
    assert [(role, bits) for role, bits, _, _ in rows[:6]] == [("weight", b) for b in ("2", "3", "4", "6", "8", "all")]
    assert len(rows) == 12
    for _, bits, divergence, loss in rows:
        if bits != "all":
            assert divergence == pytest.approx(1.0)
            assert loss == pytest.approx(-1.0)
    ours, kl = (scores(script, f).weight for f in (1.0, 2.0))
    flat = [[table[name][bits] for name in table for bits in script.BITS] for table in (ours, kl)]
    assert rows[5][2] == pytest.approx(spearmanr(*flat).statistic)


def test_every_case_is_a_score_with_images(script: ModuleType) -> None:
    assert all(
        isinstance(case.score, Score) and 1 <= case.images <= 128 * script.CALIBRATING for case in script.CASES.values()
    )


def test_table_has_a_row_for_each_score_and_role_and_one_for_each_large_network() -> None:
    small = {"model": "net", "score": "fisher", "role": "weight", "spearman_kl": "0.876", "spearman_loss": "0.5",
             "passes": "4.04", "images": "512", "measured_images": "1024", "peak_bytes": ""}  # fmt: skip
    large = {"model": "big", "score": "fisher", "role": "", "bits": "", "spearman_kl": "", "passes": "3.3",
             "images": "8", "peak_bytes": str(3 * 2**30), "cpu_s": "12.3", "notes": "n"}  # fmt: skip
    old = {**small, "bits": "2", "spearman_kl": "0.1"}
    rows = [old, {**small, "bits": "2"}, {**small, "bits": "all"}, large]
    table = load_script("render_results").KINDS["scores"](rows)
    assert "| Score | Of | 2 bits | All | All, loss | Passes | Images |" in table
    assert "| fisher | weight | 0.88 | 0.88 | 0.50 | 4.0 | 512 |" in table
    assert "Measured on 1024 images." in table
    assert "| big | fisher | 3.0 | 3.3 | 12 | 8 | n |" in table
