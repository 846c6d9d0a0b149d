"""Two processes started by torchrun train what two processes started by qtrain itself do, bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed.ranks import losses_of, student_of

OVERRIDES = [
    "data=digits", "data.max_train=192", "data.batch_size=48", "data.max_test=60", "model=cifar_resnet8",
    "quantize.calibration_batches=1", "fit.epochs=2", "fit.log_every_steps=1", "fit.health_every_steps=0",
    "full_precision.epochs=1", "fit.reestimate_bn=0", "trainer=cpu", "trainer.devices=2", "name=run",
]  # fmt: skip
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "qtrain"]


def start(launcher: list[str], folder: Path) -> Path:
    command = [sys.executable, "-m", *launcher, *OVERRIDES, f"output={folder}", f"full_precision.folder={folder}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "adhoc" / "run"


@pytest.mark.slow
def test_torchrun_trains_what_the_own_launcher_trains(tmp_path: Path) -> None:
    runs = []
    for name, launcher in (("own", ["qtrain"]), ("torchrun", TORCHRUN)):
        folder = tmp_path / name
        folder.mkdir()
        runs.append(start(launcher, folder))
    own, torchrun = map(student_of, runs)
    assert own.keys() == torchrun.keys() and all(torch.equal(own[name], torchrun[name]) for name in own)
    assert losses_of(runs[0]) == losses_of(runs[1]) and len(losses_of(runs[0])) == 8
