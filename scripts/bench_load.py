"""What loading a student's file takes: seconds beyond imports, and memory beyond what the process has by then.

    python scripts/bench_load.py                                     # ResNet-20 and ResNet-50, W4A4
    python scripts/bench_load.py --models resnet50 --weight pruned quantize.weight.huffman=true
    python scripts/bench_load.py --threads 1 --results results/load.csv

Each measurement is a process of its own, which imports first and loads or builds once. The 1 of ``ratio`` is the time
that the float network takes to be built, with random weights; the 1 of ``memory`` are the bytes of its parameters and
buffers. Numbers are medians over the rounds. Nothing is asserted. Memory is measured on Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import qtrain
from qtrain.packed.header import FileSize, Images, Network
from qtrain.packed.networks import TIMM, build_network
from qtrain.packed.save import save_student
from qtrain.pipeline.results import append_row, provenance
from qtrain.utils.errors import ConfigError

SIZES = {"cifar_resnet20": 32}
"""Pixels of the images that a network is for; 224 for others."""

FAST = ("observer@quantize.weight_observer=min_max", "observer@quantize.input_observer=min_max")
"""Which scales are found makes no difference to loading."""

CHILD = """
import json, sys, time
import torch
from qtrain.packed.header import Network
from qtrain.packed.load import load_student
from qtrain.packed.networks import build_network

def memory(name):
    try:
        lines = open("/proc/self/status").read().splitlines()
    except OSError:
        return 0
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])

network, file = Network(**json.loads(sys.argv[1])), sys.argv[2]
try:
    open("/proc/self/clear_refs", "w").write("5")  # the peak is counted anew from here
except OSError:
    pass
before, start = memory("VmRSS"), time.perf_counter()
model = load_student(file) if file else build_network(network)
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "peak": memory("VmHWM") - before}))
"""


@dataclass(frozen=True)
class Measured:
    """Median seconds of loading and of building the float network, and bytes by which the process grew meanwhile."""

    load_s: float
    build_s: float
    load_bytes: float
    build_bytes: float


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["cifar_resnet20", "resnet50"], help="of timm (%(default)s)")
    parser.add_argument("--bits", type=int, default=4, help="of weights and inputs (%(default)s)")
    parser.add_argument("--weight", default="lsq", help="the weights' quantizer (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="processes of each kind, in turn (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (%(default)s)")
    parser.add_argument("--results", type=Path, help="CSV file that gets a row for each model")
    parser.add_argument("overrides", nargs="*", help="key=value of the quantization")
    options = parser.parse_args(arguments)
    try:
        for name in options.models:
            _bench(name, options)
    except ConfigError as error:
        print(f"bench_load: error: {error}", file=sys.stderr)
        return 2
    return 0


def _bench(name: str, options: argparse.Namespace) -> None:
    network = Network(
        TIMM, {"name": name, "num_classes": 10 if name in SIZES else 1000, "image_size": SIZES.get(name, 224)}
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "student.safetensors"
        size, float_bytes = _saved(network, file, options)
        measured = measure(network, file, rounds=options.rounds, threads=options.threads)
    memory = measured.load_bytes / float_bytes
    print(
        f"{name:<20} {1e3 * measured.load_s:8.1f} ms, {measured.load_s / measured.build_s:5.2f} of building;"
        f" {measured.load_bytes / 2**20:7.1f} MiB, {memory:5.2f} of the float model; file {size.file_bytes} bytes"
    )
    if options.results is not None:
        append_row(
            options.results,
            provenance()
            | {
                "task": "bench_load", "model": name, "quantizer": options.weight,
                "w_bits": options.bits, "a_bits": options.bits,
                "size_bytes": size.file_bytes - size.header_bytes, "fp_size_bytes": float_bytes,
                "wall_s": measured.load_s,
                "notes": " ".join([f"rounds={options.rounds} threads={options.threads}", *options.overrides]),
                "file_bytes": size.file_bytes, "load_s": measured.load_s, "build_s": measured.build_s,
                "ratio": measured.load_s / measured.build_s, "load_bytes": int(measured.load_bytes),
                "build_bytes": int(measured.build_bytes), "memory": memory,
            },
        )  # fmt: skip


def measure(network: Network, file: Path, *, rounds: int, threads: int) -> Measured:
    """Medians over ``rounds`` processes that load ``file``, in turn with as many that build ``network``."""
    loads, builds = [], []
    for _ in range(rounds):
        builds.append(_in_a_process(network, None, threads))
        loads.append(_in_a_process(network, file, threads))
    load_s, load_bytes = (statistics.median(values) for values in zip(*loads, strict=True))
    build_s, build_bytes = (statistics.median(values) for values in zip(*builds, strict=True))
    return Measured(load_s, build_s, load_bytes, build_bytes)


def _saved(network: Network, file: Path, options: argparse.Namespace) -> tuple[FileSize, int]:
    """Write a student of ``network`` to ``file``; its size, and the bytes of ``network``'s numbers."""
    torch.manual_seed(0)
    model = build_network(network)
    float_bytes = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    pixels = int(network.options["image_size"])
    student = qtrain.quantize(
        model,
        torch.randn(2, 3, pixels, pixels),
        weight_bits=options.bits,
        input_bits=options.bits,
        weight=options.weight,
        options=[*FAST, *options.overrides],
    )
    return save_student(student, file, network=network, images=Images((3, pixels, pixels))), float_bytes


def _in_a_process(network: Network, file: Path | None, threads: int) -> tuple[float, float]:
    """Seconds and bytes of loading ``file``, or without one of building ``network``."""
    described = json.dumps({"builder": network.builder, "options": network.options})
    done = subprocess.run(
        [sys.executable, "-c", CHILD, described, str(file or "")],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )
    said = json.loads(done.stdout.splitlines()[-1])
    return said["seconds"], said["peak"]


if __name__ == "__main__":
    sys.exit(main())
