"""What is trained is what was trained: the loss of each step of each kind of run, as it was stored.

A change that is meant to change them stores them anew: ``python -m tests.golden.runs``.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.golden.runs import RUNS, STORED

ROOT = Path(__file__).resolve().parents[2]

LOSSES: dict[str, list[float]] = json.loads(STORED.read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all runs write: weights and a teacher's answers are made once."""
    return tmp_path_factory.mktemp("golden")


IN_A_PROCESS = """
import json, sys
from pathlib import Path
from tests.golden.runs import losses_of
print(json.dumps(losses_of(sys.argv[1], Path(sys.argv[2]))))
"""


@pytest.mark.parametrize("name", RUNS)
def test_each_step_has_the_loss_that_was_stored(name: str, folder: Path) -> None:
    """In a process of its own: the sums are replaced for all of torch, and other tests leave libraries behind."""
    command = [sys.executable, "-c", IN_A_PROCESS, name, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    losses = json.loads(done.stdout.splitlines()[-1])
    assert losses == pytest.approx(LOSSES[name], rel=1e-6, abs=1e-6)


def test_the_stored_runs_are_those_and_learn_each_its_own_way() -> None:
    assert LOSSES.keys() == RUNS.keys()
    assert LOSSES["replayed"] == LOSSES["cached"] == pytest.approx(LOSSES["distilled"], rel=1e-9)
    assert all(len(losses) >= 6 for losses in LOSSES.values())
