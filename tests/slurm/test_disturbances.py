"""Whatever happens to a job, its run ends as if nothing had: the same weights and metrics, bit for bit."""

from __future__ import annotations

import re

import pytest

from tests.slurm.scenes import Played
from tests.slurm.trainings import STEPS, differences, metrics


@pytest.mark.scene("undisturbed")
def test_two_nodes_train_the_quickstart(played: Played) -> None:
    played.check()
    assert "2 nodes (node[1-2]), 2 ranks, no GPUs on a node" in played.log
    assert "SLURM job 1: training begins at step 0, epoch 0" in played.log
    assert [row["step"] for row in metrics(played.folder) if row["split"] == "train"] == list(range(1, STEPS + 1))


def went_on(played: Played, undisturbed: Played, *, said: list[str], at: str = "[1-9]") -> None:
    """After one restart; after more where SLURM itself loses sight of a start, as it does on a machine that is busy."""
    undisturbed.check()
    played.check()
    assert played.restarts >= 1
    assert re.search(rf"restarted (once|\d+ times): training begins at step {at}", played.log), played.log
    for text in said:
        assert text in played.log, played.log
    assert differences(played.folder, undisturbed.folder) == []


@pytest.mark.scene("usr1")
def test_usr1_saves_and_requeues_though_ranks_are_skewed(played: Played, undisturbed: Played) -> None:
    # Ranks agree every 16 steps, and rank 0 is the one that has to wait.
    said = ["stopped by SIGUSR1; saved", "step-00000016.ckpt", "training begins at step 16, epoch 0"]
    went_on(played, undisturbed, said=said)


@pytest.mark.scene("time_limit")
def test_what_exceeds_the_time_limit_goes_on_in_another_start(played: Played, undisturbed: Played) -> None:
    # The signal may have come before the first step.
    went_on(played, undisturbed, said=["SIGUSR1"], at="[0-9]")
    assert "DUE TO TIME LIMIT" not in played.log


@pytest.mark.scene("killed_rank")
def test_a_killed_rank_restarts_the_job(played: Played, undisturbed: Played) -> None:
    went_on(played, undisturbed, said=["Killed", "requeued, to go on"])


@pytest.mark.scene("killed_rank")
def test_a_second_job_in_the_same_folder_is_refused(played: Played) -> None:
    played.check()
    log = (played.folder.parents[2] / "second.out").read_text()
    (line,) = [line for line in log.splitlines() if "error: " in line and "qtrain" in line]
    assert "is in use by SLURM job" in line and "on node1, since" in line
    assert "requeued" not in log


@pytest.mark.scene("killed_while_saving")
def test_a_kill_during_a_save_costs_that_save(played: Played, undisturbed: Played) -> None:
    went_on(played, undisturbed, said=["requeued, to go on", "training begins at step 8, epoch 0"])


@pytest.mark.scene("preempted")
def test_a_preempted_job_saves_and_comes_back(played: Played, undisturbed: Played) -> None:
    said = ["stopped by SIGTERM; saved", "is requeued and goes on", "training begins at step 16"]
    went_on(played, undisturbed, said=said)


@pytest.mark.scene("crashed_node")
def test_a_node_that_crashed_comes_back_into_the_run(played: Played, undisturbed: Played) -> None:
    went_on(played, undisturbed, said=[])


@pytest.mark.scene("crashed_first_node")
def test_slurm_restarts_a_job_whose_batch_script_died(played: Played, undisturbed: Played) -> None:
    went_on(played, undisturbed, said=[])
