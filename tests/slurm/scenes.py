"""What happens to a training on a cluster: each scene submits one, brings something upon it, and waits for its end.

Scenes on one half of the nodes are played beside those on the other half; tests look at what is left of them.
"""

from __future__ import annotations

import json
import os
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import final

from tests.slurm.cluster import until
from tests.slurm.trainings import Run, Trainings

SLOW = "+callbacks.slow={_target_: faults.Slow, _partial_: true, rank: %s, seconds: %s}"
DIE = "+callbacks.die={_target_: faults.DieWhileSaving, _partial_: true, step: 12}"

PREEMPTING = "--exclusive --nodes=2 --partition=high --output=/dev/null".split()


@final
@dataclass(frozen=True)
class Played:
    """What is left of a scene: output of its job, how often SLURM restarted it, folder of the run; or what failed."""

    log: str = ""
    restarts: int = 0
    folder: Path = Path()
    seconds: float = 0.0
    failure: str = ""

    def check(self) -> None:
        """``AssertionError`` if the scene itself failed."""
        assert not self.failure, f"{self.failure}\n{self.log[-6000:]}"


def undisturbed(trainings: Trainings) -> Run:
    """Nothing happens."""
    run = trainings.submit("undisturbed")
    run.ended()
    return run


def usr1(trainings: Trainings) -> Run:
    """SIGUSR1 for all ranks, of which one is slow; loader workers are alive."""
    run = trainings.submit("usr1", SLOW % (1, 0.3))
    run.wait_for_step(3)
    trainings.cluster.run("scancel", "--signal=USR1", run.job)
    run.ended()
    return run


def time_limit(trainings: Trainings) -> Run:
    """The first start would take longer than the job may.

    SLURM sends the signal up to a minute early: 20 to 80 seconds after the start, so that there are 100 for a save.
    """
    run = trainings.submit("time_limit", SLOW % ("null", 2), sbatch=("--nodes=2", "--time=3", "--signal=USR1@100"))
    run.ended(seconds=800)
    return run


def killed_rank(trainings: Trainings) -> Run:
    """SIGKILL for the rank on the second node, as the kernel sends it where memory runs out.

    Before that, another job is given the same folder.
    """
    slow = SLOW % ("null", 3)
    run = trainings.submit("killed_rank", slow)
    run.wait_for_step(4)
    trainings.submit("second", slow, "name=killed_rank", sbatch=("--nodes=1",)).ended("FAILED")
    (rank,) = trainings.cluster.ranks(run.job, "node2")
    os.kill(rank, signal.SIGKILL)
    run.ended()
    return run


def killed_while_saving(trainings: Trainings) -> Run:
    """SIGKILL when half of a resume point is written."""
    run = trainings.submit("killed_while_saving", DIE)
    run.ended()
    return run


def preempted(trainings: Trainings) -> Run:
    """A job of a higher partition needs the nodes."""
    run = trainings.submit("preempted", SLOW % ("null", 0.2), sbatch=("--nodes=2", "--partition=low"))
    run.wait_for_step(3)
    other = trainings.cluster.submit(*PREEMPTING, "--wrap=sleep 1", cwd=trainings.folder)
    trainings.cluster.wait(other, "COMPLETED")
    run.ended()
    return run


def crashed_node(trainings: Trainings) -> Run:
    """The second node dies in the middle of an epoch, and comes back when SLURM has missed it."""
    return _crash(trainings, "crashed_node", "node4")


def crashed_first_node(trainings: Trainings) -> Run:
    """The node of the batch script dies, and with it all that could requeue the job from within."""
    return _crash(trainings, "crashed_first_node", "node3")


def _crash(trainings: Trainings, name: str, node: str) -> Run:
    run = trainings.submit(name, SLOW % ("null", 0.2), sbatch=("--nodes=2", "--partition=high"))
    run.wait_for_step(10)
    trainings.cluster.crash(node)
    until(lambda: trainings.cluster.state(run.job) != "RUNNING", seconds=120, what=f"SLURM to miss {node}")
    trainings.cluster.up(node)
    run.ended()
    return run


def array(trainings: Trainings) -> Run:
    """Two tasks that need the same full-precision weights, which nobody has trained yet."""
    lines = trainings.folder / "lines.txt"
    lines.write_text("name=first quantize.bits.weight=8\nname='second' quantize.bits.weight=2\n")
    own = f"full_precision.folder={trainings.folder}/weights_of_array"
    return trainings.submit_array(lines, "--array=1-2", own)


def multirun(trainings: Trainings) -> Run:
    """By submitit: each job of a Hydra multirun is one of SLURM."""
    return trainings.multirun("quantize.bits.weight=4,8")


def batch_files(trainings: Trainings) -> Run:
    """What batch files do around a training; their ends and exit codes go into a file."""
    two, train = ("--nodes=2", "--open-mode=append"), "slurm/train.sbatch"
    final = "[ $SLURM_PROCID = 1 ] && sleep 60; echo 2 > $QTRAIN_EXIT_FILE; exit 2"
    runs = {
        "unfit": trainings.submit_stub("unfit", *two, train, does="", QTRAIN_PYTHON="/nowhere", QTRAIN_DATA="/none"),
        "final": trainings.submit_stub("final", *two, train, does=final),
        "failing": trainings.submit_stub("failing", train, "overwrite=true", does="exit 1", QTRAIN_RESTARTS="1"),
        "seeds": trainings.submit_stub("seeds", "--array=7", "slurm/array.sbatch", "a=b", does=""),
        "cancelled": trainings.submit_stub("cancelled", train, does="sleep 100"),
    }
    until(lambda: "rank 0" in runs["cancelled"].log(), seconds=60, what="a start")
    trainings.cluster.run("scancel", runs["cancelled"].job)
    ends = {}
    for name, run in runs.items():
        run.ended("COMPLETED", "FAILED", "CANCELLED")
        facts = trainings.cluster.job(run.job)
        ends[name] = [facts["JobState"], facts["ExitCode"], facts["Restarts"]]
    (trainings.folder / "ends.json").write_text(json.dumps(ends))
    return runs["unfit"]


def sweep(trainings: Trainings) -> Run:
    """Four trials by slurm/sweep.sbatch, over two nodes of one CPU each."""
    output = trainings.folder / "sweep.out"
    fast = ["sweep.trials=4", "sweep.start=[]", "search@sweep.search=random", "scheduler@sweep.scheduler=none"]
    run = trainings.submit_sweep(output, *fast)
    run.ended(seconds=400)
    return run


ON_FIRST_NODES: dict[str, Callable[[Trainings], Run]] = {
    "time_limit": time_limit,
    "usr1": usr1,
    "killed_rank": killed_rank,
    "killed_while_saving": killed_while_saving,
    "array": array,
    "multirun": multirun,
    "batch_files": batch_files,
    "sweep": sweep,
}
"""Scenes on the first two nodes."""

ON_OTHER_NODES: dict[str, Callable[[Trainings], Run]] = {
    "preempted": preempted,
    "crashed_node": crashed_node,
    "crashed_first_node": crashed_first_node,
}
"""Scenes in which nodes crash or jobs are preempted, on the other two."""

SCENES = ["undisturbed", *ON_FIRST_NODES, *ON_OTHER_NODES]


def play(trainings: Trainings, names: Sequence[str]) -> dict[str, Played]:
    """Play the scenes; the undisturbed one first, in any case, which leaves full-precision weights to the others."""
    played = {"undisturbed": _play(undisturbed, trainings)}

    def one_by_one(scenes: dict[str, Callable[[Trainings], Run]]) -> dict[str, Played]:
        return {name: _play(scene, trainings) for name, scene in scenes.items() if name in names}

    with ThreadPoolExecutor() as pool:
        for half in [pool.submit(one_by_one, scenes) for scenes in (ON_FIRST_NODES, ON_OTHER_NODES)]:
            played |= half.result()
    return played


def _play(scene: Callable[[Trainings], Run], trainings: Trainings) -> Played:
    begin = time.monotonic()
    try:
        run = scene(trainings)
    except Exception:
        output = trainings.folder / f"{scene.__name__}.out"
        log = output.read_text(errors="replace") if output.exists() else ""
        return Played(log=log, failure=traceback.format_exc(), seconds=time.monotonic() - begin)
    restarts = trainings.cluster.restarts(run.job) if run.job else 0
    return Played(run.log(), restarts, run.folder, time.monotonic() - begin)
