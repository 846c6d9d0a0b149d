"""What a trial of a sweep costs beyond its training, on a worker that has run trials before.

    python scripts/bench_sweep.py                                        # ResNet-20 on the digits, other widths each
    python scripts/bench_sweep.py --trials 12 --results results/sweep_overhead.csv
    python scripts/bench_sweep.py data=cifar10 data.max_train=2560       # any overrides of the sweep

One worker runs the trials one after the other, each of one epoch. Overhead is the wall-clock time from the end of one
trial to the end of the next, without the time within the fit: proposing and composing the config, Ray's messages, data,
model, calibration, costs, records. The first trial, which finds nothing warm, is told apart. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from qtrain.config.compose import compose
from qtrain.pipeline.results import append_row, provenance
from qtrain.run_task import run_task
from qtrain.sweep.trial import Trial, read_trials

SWEEP = """
    task=sweep trainer=cpu data=digits model=cifar_resnet20 fit.epochs=1 fit.reestimate_bn=0 fit.health_every_steps=0
    full_precision.epochs=1 sweep.parallel=1 sweep.test_front=false +knob@sweep.space.widths=bit_widths
    sweep.space.widths.per=block
""".split()


@dataclass(frozen=True)
class Overhead:
    """Seconds of each trial but the first: between it and the one before, around its fit, within its fit.

    ``cold_s`` is what the first took besides its fit, the start of its worker included in none of these.
    """

    cold_s: float
    between_s: list[float]
    around_s: list[float]
    fit_s: list[float]

    @property
    def total_s(self) -> list[float]:
        return [between + around for between, around in zip(self.between_s, self.around_s, strict=True)]


def overhead_of(trials: Sequence[Trial]) -> Overhead:
    """From the trials that one worker has finished, in any order. Raises ``ValueError`` for less than two."""
    ran = sorted((trial for trial in trials if trial.status == "finished"), key=lambda trial: trial.started)
    if len(ran) < 2:
        raise ValueError(f"bench_sweep: {len(ran)} trials have finished, and a warm one comes second at the earliest")
    return Overhead(
        cold_s=ran[0].overhead_s,
        between_s=[max(0.0, later.started - earlier.ended) for earlier, later in pairwise(ran)],
        around_s=[trial.overhead_s for trial in ran[1:]],
        fit_s=[trial.train_s for trial in ran[1:]],
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=8, help="trials, the first of them cold (%(default)s)")
    parser.add_argument("--results", type=Path, help="CSV file that gets a row")
    parser.add_argument("overrides", nargs="*", help="key=value, laid over the sweep's own")
    options = parser.parse_args(arguments)
    if options.trials < 2:
        parser.error(f"--trials must be at least 2, got {options.trials}")
    with tempfile.TemporaryDirectory() as folder:
        overrides = [*SWEEP, f"sweep.trials={options.trials}", *options.overrides, f"output={folder}"]
        try:
            cfg = compose(overrides)
            run_task(cfg, overrides)
            overhead = overhead_of(read_trials(Path(cfg.run_dir)))
        except ValueError as error:
            print(f"bench_sweep: error: {error}", file=sys.stderr)
            return 2
    median, worst = statistics.median(overhead.total_s), max(overhead.total_s)
    print(
        f"{cfg.model.name} on {cfg.data.name}: overhead of a warm trial {median:.2f} s (median), {worst:.2f} s (worst "
        f"of {len(overhead.total_s)}); of a cold one {overhead.cold_s:.1f} s; its fit "
        f"{statistics.median(overhead.fit_s):.1f} s"
    )
    if options.results:
        row = {
            **provenance(),
            "config_hash": cfg.identity,
            "task": "bench_sweep",
            "dataset": cfg.data.name,
            "model": cfg.model.name,
            "seed": cfg.seed,
            "epochs": cfg.fit.epochs,
            "notes": f"trials={options.trials} parallel=1 threads=1",
            "overhead_median_s": median,
            "overhead_worst_s": worst,
            "between_median_s": statistics.median(overhead.between_s),
            "around_median_s": statistics.median(overhead.around_s),
            "cold_s": overhead.cold_s,
            "fit_median_s": statistics.median(overhead.fit_s),
        }
        append_row(options.results, row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
