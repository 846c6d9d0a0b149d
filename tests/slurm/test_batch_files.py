"""What slurm/*.sbatch check, hand through, start again and leave alone: a real SLURM, a shell script to start."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.slurm.scenes import Played

FOLDER = Path(__file__).resolve().parents[2] / "slurm"


def end(played: Played, name: str) -> tuple[list[str], str]:
    """State, exit code and number of restarts of a job, and its output."""
    played.check()
    return json.loads((played.folder / "ends.json").read_text())[name], (played.folder / f"stub-{name}.out").read_text()


@pytest.mark.scene("batch_files")
def test_what_is_wrong_on_a_node_is_said_before_training(played: Played) -> None:
    ended, log = end(played, "unfit")
    assert ended == ["FAILED", "2:0", "0"]
    for node in ("node1", "node2"):
        assert f"qtrain: error: {node}: /nowhere is no Python that has qtrain; edit QTRAIN_PYTHON" in log
        assert f"qtrain: error: {node}: no folder /none; edit QTRAIN_DATA" in log
    assert len(log.splitlines()) == 4


@pytest.mark.scene("batch_files")
def test_what_a_user_has_to_mend_is_not_tried_again(played: Played) -> None:
    """Though srun ends the other rank, and takes that one's code for the job's."""
    ended, log = end(played, "final")
    assert ended == ["FAILED", "2:0", "0"]
    assert "requeued" not in log


@pytest.mark.scene("batch_files")
def test_what_fails_again_and_again_is_given_up(played: Played) -> None:
    ended, log = end(played, "failing")
    assert ended == ["FAILED", "1:0", "1"]
    first, second = (line for line in log.splitlines() if line.startswith("rank 0: "))
    assert first.endswith("overwrite=true")
    # What the first start began, the second does not throw away.
    assert second.endswith("overwrite=true resume=true overwrite=false")
    assert "ended with code 1 after 1 restarts, no more" in log


@pytest.mark.scene("batch_files")
def test_tasks_of_an_array_are_seeds(played: Played) -> None:
    ended, log = end(played, "seeds")
    assert ended == ["COMPLETED", "0:0", "0"]
    assert "trainer.num_nodes=1 trainer.devices=1 a=b seed=7\n" in log


@pytest.mark.scene("batch_files")
def test_a_cancelled_job_stays_cancelled(played: Played) -> None:
    ended, log = end(played, "cancelled")
    assert ended[0] == "CANCELLED" and ended[2] == "0"
    assert "requeued" not in log


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("file", sorted(path.name for path in FOLDER.iterdir()))
def test_shellcheck_has_nothing_to_say(file: str) -> None:
    # From where the files are submitted, so that it finds what they read in.
    command = ["shellcheck", "--external-sources", f"{FOLDER.name}/{file}"]
    done = subprocess.run(command, cwd=FOLDER.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
