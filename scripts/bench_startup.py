"""What a command costs before it trains: processor seconds of whole processes, of their own code and the system's.

    python scripts/bench_startup.py                                # help, a mistyped key, one step on the digits
    python scripts/bench_startup.py --cases compiled again --rounds 1    # the same step, compiled; and once more
    python scripts/bench_startup.py --results results/bench.csv

Processor seconds and not time on the clock, so that other work on the machine changes them little. ``step`` trains one
step of an untrained ResNet-8 on 64 digits, and tests and saves the student. ``again`` finds on disk what ``compiled``
compiled, and so tells what a run costs that is not the first of its kind. Each round runs every case once in a
process of its own; the figure is the median over rounds. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from qtrain.pipeline.results import append_row, provenance

STEP = (
    "data=digits model=cifar_resnet8 objective=hard trainer=cpu logger=none data.max_train=64 data.max_test=64 "
    "fit.epochs=1 fit.reestimate_bn=0 full_precision.epochs=0"
)
CASES = {
    "help": "--help",
    "typo": "quantise.x=3",
    "step": f"{STEP} fit.compile=false",
    "compiled": f"{STEP} fit.compile=true",
    "again": f"{STEP} fit.compile=true",
}
"""Name -> command line; only the second is refused, with exit code 2."""

TRAINED = ("step", "compiled", "again")
"""Cases that train a step."""


def processor_s(case: str, model: str = "cifar_resnet8") -> float:
    """Processor seconds of a process that runs ``case``, and of those that it starts. Raises where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        kept = {"QTRAIN_CACHE": f"{folder}/cache", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/graphs"}
        for number in range(2 if case == "again" else 1):
            arguments = CASES[case].replace("model=cifar_resnet8", f"model={model}").split()
            if case in TRAINED:
                arguments.append(f"output={folder}/{number}")
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            command = [sys.executable, "-m", "qtrain", *arguments]
            done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **kept})
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            if done.returncode != (2 if case == "typo" else 0):
                raise ValueError(f"{case} ended with {done.returncode}: {done.stderr[-500:]}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=["help", "typo", "step"])
    parser.add_argument("--model", default="cifar_resnet8", help="of the cases that train (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="processes for each case (%(default)s)")
    parser.add_argument("--results", type=Path, help="CSV file that gets a row for each case")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    measured: dict[str, list[float]] = {case: [] for case in options.cases}
    for _ in range(options.rounds):
        for case, seconds in measured.items():
            seconds.append(processor_s(case, options.model))
    for case, seconds in measured.items():
        middle = statistics.median(seconds)
        print(f"{case}: {middle:.2f} processor seconds (median of {len(seconds)}; {min(seconds):.2f} the least)")
        if options.results:
            trained = {"dataset": "digits", "model": options.model, "w_bits": 4, "a_bits": 4, "seed": 0, "epochs": 1}
            row = {
                **provenance(),
                **(trained if case in TRAINED else {}),
                "task": "bench_startup",
                "case": f"start-up: {case}",
                "mode": "eager" if case not in TRAINED or case == "step" else "compiled",
                "processor_s": middle,
                "notes": f"processor seconds of a process, rounds={len(seconds)}",
            }
            append_row(options.results, row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
