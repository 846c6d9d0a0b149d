"""Starting N processes that train together, and comparing what they leave."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from subprocess import Popen

from safetensors.torch import load_file
from torch import Tensor

MAIN = Path(__file__).with_name("rank_main.py")


def start(ranks: int, runs: Mapping[str, Sequence[str]], folder: Path, *, shared: Sequence[str]) -> list[Popen[bytes]]:
    """Start ``ranks`` gloo processes that train each of ``runs`` (name -> overrides), into ``folder``/adhoc/<name>."""
    folder.mkdir(parents=True, exist_ok=True)
    jobs = folder / "jobs.json"
    overrides = [[*shared, *own, f"output={folder}", f"name={name}"] for name, own in runs.items()]
    jobs.write_text(json.dumps([{"overrides": own} for own in overrides]))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(ranks):
        env = {
            **os.environ,
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks), "RANK": str(rank),
            "LOCAL_RANK": str(rank), "NODE_RANK": "0", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
        }  # fmt: skip
        with (folder / f"rank{rank}.log").open("w") as log:
            processes.append(Popen([sys.executable, MAIN, jobs], env=env, stdout=log, stderr=log))
    return processes


def train_on(ranks: int, runs: Mapping[str, Sequence[str]], folder: Path, *, shared: Sequence[str]) -> Path:
    """As :func:`start`, to the end; returns the folder that holds the runs' own."""
    processes = start(ranks, runs, folder, shared=shared)
    try:
        codes = [process.wait(timeout=900) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * ranks, (folder / "rank0.log").read_text()[-2000:]
    return folder / "adhoc"


def student_of(run: Path) -> dict[str, Tensor]:
    """All tensors of the trained student; fails with what the run said where it was refused."""
    for refusal in run.glob("refused-*.txt"):
        raise AssertionError(refusal.read_text())
    return {name: tensor.double() for name, tensor in load_file(run / "student.safetensors").items()}


def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, float]:
    """Largest difference of each tensor, relative to its largest value."""
    assert one.keys() == other.keys()
    return {name: _relative(one[name], other[name]) for name in one}


def _relative(one: Tensor, other: Tensor) -> float:
    size = max(float(one.abs().max()) if one.numel() else 0.0, 1e-12)
    return float((one - other).abs().max()) / size if one.numel() else 0.0


def losses_of(run: Path) -> list[float]:
    """``total`` of each training row."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["total"] for row in rows if "total" in row]
