"""A tiny training on the cluster: how it is submitted, watched, and compared with another."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits

from tests.helpers.latent import latent_state
from tests.slurm.cluster import Cluster, until

ROOT = Path(__file__).resolve().parents[2]

EPOCHS, STEPS_PER_EPOCH = 2, 20
STEPS = EPOCHS * STEPS_PER_EPOCH

TINY = [
    "+experiment=quickstart", "variants=null", "data=imagefolder", "data.image_size=8", "data.channels=3",
    "data.batch_size=8", "data.workers=1", "full_precision.epochs=1", f"fit.epochs={EPOCHS}", "fit.log_every_steps=1",
    "fit.checkpoint_every_steps=4", "fit.health_every_steps=0", "fit.reestimate_bn=2", "trainer.accelerator=cpu",
    "quantize.calibration_batches=2", "allow_targets=[faults]",
]  # fmt: skip
"""The quickstart's distilled W4A4 student on few images, read from files by a worker process of each rank."""


def write_digits(root: Path) -> None:
    """160 training and 40 test images of handwritten digits as files, in the layout of ``data=imagefolder``."""
    digits = load_digits()
    pixels = (digits.images * 15.9).astype(np.uint8)
    for split, start, count in (("train", 0, 16), ("val", 1000, 4)):
        for target in range(10):
            folder = root / split / str(target)
            folder.mkdir(parents=True)
            for number in np.flatnonzero(digits.target[start:] == target)[:count]:
                Image.fromarray(pixels[start + number]).save(folder / f"{number}.png")


@final
@dataclass(frozen=True)
class Run:
    """A submitted training: its job, its output, the folder of its run. A multirun has many jobs, and names none."""

    cluster: Cluster
    job: str
    output: Path
    folder: Path

    def log(self) -> str:
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def wait_for_step(self, step: int, seconds: float = 400) -> None:
        """Until so many optimizer steps are written to metrics.jsonl."""

        def there() -> bool:
            rows = metrics(self.folder)
            return bool(rows) and rows[-1]["step"] >= step

        until(there, seconds=seconds, what=f"step {step} of job {self.job}")

    def ended(self, *states: str, seconds: float = 400) -> None:
        self.cluster.wait(self.job, *states, seconds=seconds)


@final
@dataclass(frozen=True)
class Trainings:
    """Submits tiny trainings; all that they write lies in ``folder``."""

    cluster: Cluster
    folder: Path

    def submit(self, name: str, *overrides: str, sbatch: tuple[str, ...] = ("--nodes=2",)) -> Run:
        """One training by slurm/train.sbatch."""
        output = self.folder / f"{name}.out"
        arguments = [*sbatch, f"--output={output}", "slurm/train.sbatch", *self.overrides(), f"name={name}", *overrides]
        job = self.cluster.submit(*arguments, cwd=ROOT, env=self.environment())
        return Run(self.cluster, job, output, self.folder / "outputs/quickstart" / name)

    def submit_stub(self, name: str, *arguments: str, does: str, **environment: str) -> Run:
        """A batch file with a shell script in the place of Python, which ``does`` what a training might."""
        output = self.folder / f"stub-{name}.out"
        stub = {"QTRAIN_PYTHON": str(Path(__file__).with_name("stub.sh")), "STUB": does}
        env = {**self.environment(), **stub, **environment}
        job = self.cluster.submit(f"--output={output}", *arguments, cwd=ROOT, env=env)
        return Run(self.cluster, job, output, self.folder)

    def submit_array(self, lines: Path, tasks: str, *overrides: str) -> Run:
        """Tasks of slurm/array.sbatch, one for each line, until they have ended; their output one after the other."""
        env = {**self.environment(), "QTRAIN_LINES": str(lines)}
        output = self.folder / "array-%a.out"
        arguments = [tasks, f"--output={output}", "slurm/array.sbatch", *self.overrides(), *overrides]
        job = self.cluster.submit(*arguments, cwd=ROOT, env=env)
        numbers = range(1, len(lines.read_text().splitlines()) + 1)
        for number in numbers:
            self.cluster.wait(f"{job}_{number}", seconds=200)
        together = self.folder / "array.out"
        together.write_text("".join((self.folder / f"array-{number}.out").read_text() for number in numbers))
        return Run(self.cluster, "", together, self.folder / "outputs/quickstart")

    def submit_sweep(self, output: Path, *overrides: str) -> Run:
        """A sweep of the quickstart by slurm/sweep.sbatch."""
        chosen = ["+experiment=sweep_quickstart", "full_precision.epochs=1", "fit.epochs=1", "trainer.accelerator=cpu"]
        kept = f"full_precision.folder={self.folder}/weights"
        sbatch = ["--nodes=2", "--cpus-per-task=1", f"--output={output}", "slurm/sweep.sbatch"]
        job = self.cluster.submit(*sbatch, *chosen, kept, *overrides, cwd=ROOT, env=self.environment())
        return Run(self.cluster, job, output, self.folder / "outputs/sweep_quickstart/sweep")

    def multirun(self, *overrides: str) -> Run:
        """What ``python -m qtrain -m hydra/launcher=slurm`` makes of ``overrides``, when it has ended."""
        output = self.folder / "multirun.out"
        launcher = ["-m", "hydra/launcher=slurm", "hydra.launcher.cpus_per_task=1"]
        command = [sys.executable, "-m", "qtrain", *launcher, f"output={self.folder}/multirun"]
        env = {**self.cluster.environment(), **self.environment()}
        with output.open("w") as file:
            subprocess.run(
                [*command, *self.overrides(), *overrides], cwd=ROOT, env=env, stdout=file, stderr=file, timeout=300,
                check=True,
            )  # fmt: skip
        return Run(self.cluster, "", output, self.folder / "multirun/quickstart")

    def environment(self) -> Mapping[str, str]:
        """What a user edits in slurm/env.sh, and what these tests add."""
        return {
            "QTRAIN_PYTHON": sys.executable,
            "QTRAIN_OUTPUT": str(self.folder / "outputs"),
            "QTRAIN_DATA": str(self.folder / "digits"),
            "PYTHONPATH": str(Path(__file__).parent),
            "OMP_NUM_THREADS": "1",
        }

    def overrides(self) -> list[str]:
        return [*TINY, f"data.root={self.folder}/digits", f"full_precision.folder={self.folder}/weights"]


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl, without what a clock said; a last line that is being written is left out."""
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{key: value for key, value in row.items() if key not in ("time", "images_per_s")} for row in rows]


def differences(mine: Path, other: Path) -> list[str]:
    """In what two runs' results are not the same bit for bit: weights, scales, statistics, metrics, final metrics."""
    one, two = latent_state(mine), latent_state(other)
    found = sorted(one.keys() ^ two.keys())
    found += [name for name in one.keys() & two.keys() if not torch.equal(one[name], two[name])]
    if metrics(mine) != metrics(other):
        found.append("metrics.jsonl")
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (mine, other)]
    found += [key for key in ("top1", "fp_top1", "ptq_top1", "status") if summaries[0][key] != summaries[1][key]]
    return found
