"""What several ranks gain and resume points cost: the same training on one rank and on two, and with frequent saving.

    python scripts/bench_ranks.py                                   # ResNet-20 W4A4, CIFAR-10 in QTRAIN_CIFAR10
    python scripts/bench_ranks.py --ranks 2 --results results/ranks.csv
    python scripts/bench_ranks.py data=digits model=cifar_resnet8   # any overrides

Each case is a run of its own, one after the other, a core for each thread. A step is the median time between two rows
of ``metrics.jsonl``, which are written at every step; so it holds all that a step takes, and the wait for the slowest
rank. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from qtrain.config.compose import compose
from qtrain.pipeline.results import append_row, provenance
from qtrain.utils.json_lines import read_metrics

COMMON = """
    trainer=cpu fit.epochs=2 fit.log_every_steps=1 fit.health_every_steps=0 fit.reestimate_bn=0 fit.final_test=false
    fit.compile=false resume=false
""".split()
DEFAULT = "+experiment=cifar10/resnet20_w4a4 data.max_train=2560 data.max_test=256 teacher=none objective=hard".split()
NEVER = "fit.checkpoint_every_steps=1000000"
SETTLED = 5
"""Steps before the first that counts."""


@dataclass(frozen=True)
class Case:
    name: str
    ranks: int
    threads: int
    saving: str


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="ranks that are compared with one (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each case, in turn (%(default)s)")
    parser.add_argument("--results", type=Path, help="CSV file that gets a row for each case")
    parser.add_argument("overrides", nargs="*", help="key=value instead of the default experiment")
    options = parser.parse_args(arguments)
    cases = [
        Case("one rank, one thread", 1, 1, NEVER),
        Case(f"one rank, {options.ranks} threads", 1, options.ranks, NEVER),
        Case(f"{options.ranks} ranks, one thread each", options.ranks, 1, NEVER),
        Case("one rank, a resume point at each step", 1, 1, "fit.checkpoint_every_steps=1"),
    ]
    chosen = options.overrides or DEFAULT
    seconds: dict[Case, list[float]] = {case: [] for case in cases}
    for _ in range(options.rounds):
        for case in cases:
            seconds[case].append(_step_s(case, chosen))
    reference = statistics.median(seconds[cases[0]])
    for case in cases:
        step = statistics.median(seconds[case])
        print(f"{case.name:<40} {1e3 * step:8.1f} ms a step   {step / reference:5.2f}")
        if options.results is not None:
            append_row(options.results, _row(case, chosen, step, step / reference))
    return 0


def _step_s(case: Case, chosen: Sequence[str]) -> float:
    """Median seconds of a step, in a run of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(case.threads)}
    with tempfile.TemporaryDirectory() as folder:
        typed = [*chosen, *COMMON, case.saving, f"trainer.devices={case.ranks}", f"output={folder}", "name=run"]
        subprocess.run([sys.executable, "-m", "qtrain", *typed], check=True, env=environment, stdout=subprocess.DEVNULL)
        (metrics,) = Path(folder).glob("**/run/metrics.jsonl")
        times = [float(row["time"]) for row in read_metrics(metrics)[0] if row.get("split") == "train"]
    return statistics.median(later - earlier for earlier, later in pairwise(times[SETTLED:]))


def _row(case: Case, chosen: Sequence[str], step_s: float, ratio: float) -> dict[str, object]:
    cfg = compose([*chosen, *COMMON])
    return {
        **provenance(),
        "config_hash": cfg.identity,
        "experiment": cfg.experiment,
        "task": "bench",
        "model": cfg.model.name,
        "w_bits": cfg.quantize.bits.get("weight"),
        "a_bits": cfg.quantize.bits.get("input"),
        "seed": cfg.seed,
        "step_ms": 1e3 * step_s,
        "ratio": ratio,
        "case": case.name,
        "mode": "eager",
        "notes": f"batch={cfg.data.get('batch_size')}",
    }


if __name__ == "__main__":
    sys.exit(main())
