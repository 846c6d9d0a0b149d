"""Every allocator beside uniform and random bits, at three budgets, on CIFAR-10's ResNet-20.

    python scripts/allocate.py                                   # calibrated without training: a minute a row
    python scripts/allocate.py --ways brecq probe --allocators uniform random program-fisher
    python scripts/allocate.py --ways cpu --seeds 0 1 2 --budgets w3 --allocators uniform program-fisher
    python scripts/allocate.py --experiment quickstart --allocators uniform program-fisher program-clado \
        --results results/allocation_digits.csv                  # pairs of layers need a small network

A budget bounds size and bit operations at once, so that an allocation and the uniform bits beside it cost the same or
the allocation costs less. One named ``-size`` bounds the file alone, and inputs have the same bits in both. First and
last layer have 8 bits unless the row says otherwise. A row is added for each combination that the table lacks, so a
stopped command goes on. Needs QTRAIN_CIFAR10, QTRAIN_RESNET20 and, for trained rows, QTRAIN_RESNET56.
"""

import argparse
import logging
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from qtrain.config.compose import compose
from qtrain.pipeline.results import append_row, read_results
from qtrain.run_task import run_task
from qtrain.settings.run_files import RESULTS as ROWS_OF_RUN
from qtrain.utils.errors import ConfigError

EXPERIMENT = "cifar10/resnet20_w4a4"
RESULTS = Path("results/allocation.csv")

BUDGETS: dict[str, tuple[int, int, tuple[str, ...]]] = {
    # Uniform bits, then the budgets. ResNet-20 with its ends at 8 bits: 40.1 million products between them.
    "w3": (3, 3, ("allocate.budgets.size_bytes=100%", "allocate.budgets.bops=100%")),
    # Half way between the sizes of W2 and W3, and 2.5 x 2.5 bits for each product: 85.5 % and 71.7 % of W3A3.
    "w2.5": (3, 3, ("allocate.budgets.size_bytes=85.5%", "allocate.budgets.bops=71.7%")),
    # W4A2: the size of W4, and half the bit operations of W4A4 between the ends.
    "half": (4, 2, ("allocate.budgets.size_bytes=100%", "allocate.budgets.bops=100%")),
    # The file alone counts: weights of other widths, every input at 3 bits.
    "w3-size": (3, 3, ("allocate.budgets.size_bytes=100%", "allocate.input=[3]")),
    "w2.5-size": (3, 3, ("allocate.budgets.size_bytes=85.5%", "allocate.input=[3]")),
    # The same with inputs of 8 bits, beside which it is the weights that lose.
    "w3a8-size": (3, 8, ("allocate.budgets.size_bytes=100%", "allocate.input=[8]")),
}
"""What a model may cost."""

UNIFORM: dict[str, dict[str, tuple[int, int]]] = {
    "w3": {"uniform": (3, 3)},
    "w2.5": {"uniform": (2, 3)},
    "half": {"uniform": (4, 2), "uniform-w2a4": (2, 4), "uniform-w3a2": (3, 2)},
    "w3-size": {"uniform": (3, 3)},
    "w2.5-size": {"uniform": (2, 3)},
    "w3a8-size": {"uniform": (3, 8)},
}
"""Uniform bits within each budget."""

BEYOND: dict[str, dict[str, tuple[int, int]]] = {
    "w3-size": {"beyond-w8a3": (8, 3)},
    "w2.5-size": {"beyond-w8a3": (8, 3)},
    "w3a8-size": {"beyond-w8a8": (8, 8)},
}
"""Uniform bits that no budget allows: what an allocation of the weights' bits could reach at most."""

NO_ENDS = ("quantize.bits.first=null", "quantize.bits.last=null")

SEARCHES: dict[str, tuple[str, ...]] = {
    "random": ("allocate@quantize.bits=random",),
    "program-fisher": ("allocate@quantize.bits=integer_program", "allocate.weight_error=1"),
    "program-fisher-0.1": ("allocate@quantize.bits=integer_program", "allocate.weight_error=0.1"),
    # Training wins back what weights lose at 2 bits, and not what inputs lose there.
    "program-fisher-0.1-inputs3": (
        "allocate@quantize.bits=integer_program",
        "allocate.weight_error=0.1",
        "allocate.input=[3,4,5,6,8]",
    ),
    "program-one_layer": ("allocate@quantize.bits=integer_program", "score@allocate.score=one_layer"),
    "program-hawq_trace": ("allocate@quantize.bits=integer_program", "score@allocate.score=hawq_trace"),
    "program-hawq_eigenvalue": ("allocate@quantize.bits=integer_program", "score@allocate.score=hawq_eigenvalue"),
    "program-limpq": ("allocate@quantize.bits=integer_program", "score@allocate.score=limpq"),
    # Steps are no squared errors of which training wins back a part, and yet they order better with that part.
    "program-limpq-whole": (
        "allocate@quantize.bits=integer_program",
        "score@allocate.score=limpq",
        "allocate.weight_error=1",
    ),
    "pareto-fisher": ("allocate@quantize.bits=pareto", "allocate.weight_error=1"),
    "evolution": ("allocate@quantize.bits=evolution",),
    "learned": ("allocate@quantize.bits=learned",),
    "reinforcement": ("allocate@quantize.bits=reinforcement",),
}
"""Allocators -> what chooses them."""

OF_SMALL_NETWORKS: dict[str, tuple[str, ...]] = {
    "program-clado": (
        "allocate@quantize.bits=integer_program", "score@allocate.score=clado", "allocate.score.pairs=10000"
    ),
}  # fmt: skip
"""Allocators that look at all pairs of choices, and so are left out where none are named."""

WAYS: dict[str, tuple[str, ...]] = {
    "calibrated": ("task=calibrate",),
    "brecq": ("task=calibrate", "rounding@quantize.rounding=brecq"),
    "probe": ("task=train", "budget=probe"),
    "cpu": ("task=train", "budget=cpu"),
    "full": ("task=train", "budget=full"),
}
"""What becomes of the bits: no training at all, learned rounding, or training with the teacher."""


def overrides(budget: str, allocator: str, way: str, seed: int, experiment: str = EXPERIMENT) -> list[str]:
    """What is typed for one row."""
    weight, input, budgets = BUDGETS[budget]
    own: tuple[str, ...] = ()
    name = allocator.removesuffix("-no-ends")
    given = UNIFORM[budget] | BEYOND.get(budget, {})
    if name in given:
        weight, input = given[name]
    else:
        own = (*(SEARCHES | OF_SMALL_NETWORKS)[name], *budgets)
    bits = (f"quantize.bits.weight={weight}", f"quantize.bits.input={input}")
    ends = NO_ENDS if allocator.endswith("-no-ends") else ()
    return [f"+experiment={experiment}", "logger=none", *WAYS[way], *own, *bits, *ends, f"seed={seed}"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for and is not in the table yet; returns the number of combinations that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", nargs="+", default=list(BUDGETS), choices=list(BUDGETS))
    parser.add_argument("--allocators", nargs="+", default=None, help="default: all there are for the budget")
    parser.add_argument("--ways", nargs="+", default=["calibrated"], choices=list(WAYS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--experiment", default=EXPERIMENT, help="whose network and data (%(default)s)")
    parser.add_argument("--output", type=Path, default=None, help="the folder of the runs (a temporary one)")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--more", nargs="*", default=[], help="further overrides of every run")
    options = parser.parse_args(arguments)
    failed = 0
    with tempfile.TemporaryDirectory() as temporary:
        for seed in options.seeds:
            for way in options.ways:
                for budget in options.budgets:
                    for allocator in options.allocators or [*UNIFORM[budget], "uniform-no-ends", *SEARCHES]:
                        key = {"budget": budget, "allocator": allocator, "way": way, "seed": str(seed)}
                        if not _is_there(options.results, key):
                            failed += not _row(key, options.output or Path(temporary), options)
    return failed


def _is_there(results: Path, key: dict[str, str]) -> bool:
    rows = read_results(results) if results.is_file() else []
    return any(all(row.get(column) == value for column, value in key.items()) for row in rows)


def _row(key: dict[str, str], output: Path, options: argparse.Namespace) -> bool:
    """Run one combination and append its row; whether it went well."""
    typed = overrides(key["budget"], key["allocator"], key["way"], int(key["seed"]), options.experiment)
    name = "-".join(key.values())
    start = time.perf_counter()
    try:
        settings = compose([*typed, f"output={output}", f"name={name}", *options.more])
        run_task(settings)
    except ConfigError as error:
        print(f"{name}: {error}", flush=True)
        return False
    (row,) = read_results(Path(settings.run_dir, ROWS_OF_RUN))[-1:]
    append_row(options.results, {**row, **key})
    print(f"{name}: {float(row['top1']):.2f} % in {time.perf_counter() - start:.0f} s", flush=True)
    return True


if __name__ == "__main__":
    logging.getLogger("qtrain").setLevel(logging.WARNING)
    raise SystemExit(main())
