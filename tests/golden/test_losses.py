"""What is trained is what was trained: the loss of each step of each kind of run, as it was stored.

A change that is meant to change them stores them anew: ``python -m tests.golden.runs``.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.golden.runs import RUNS, STORED, losses_of

LOSSES: dict[str, list[float]] = json.loads(STORED.read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all runs write: weights and a teacher's answers are made once."""
    return tmp_path_factory.mktemp("golden")


@pytest.mark.parametrize("name", RUNS)
def test_each_step_has_the_loss_that_was_stored(name: str, folder: Path) -> None:
    assert losses_of(name, folder) == pytest.approx(LOSSES[name], rel=1e-6, abs=1e-6)


def test_the_stored_runs_are_those_and_learn_each_its_own_way() -> None:
    assert LOSSES.keys() == RUNS.keys()
    assert LOSSES["replayed"] == LOSSES["cached"] == pytest.approx(LOSSES["distilled"], rel=1e-9)
    assert all(len(losses) >= 6 for losses in LOSSES.values())
